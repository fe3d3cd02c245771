"""The page of a repository: what is in it, that its Python runs, and that names of tasks cannot break it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from transformers import BertModel

from qtuning_fast import QTuningModel
from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE
from qtuning_fast.model.model_card import Asked, is_written_by_us, model_card, on_the_hub
from qtuning_fast.model.saving import checkpoint_of

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def card_of(model: QTuningModel, **more: Any) -> ModelCard:
    return model_card(checkpoint_of(model), "user/adapters", **more)


def runs(card: ModelCard, base: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the Python of the page prints, for a reader who has the base model in a folder."""
    [code] = BLOCK.findall(str(card))
    assert '"path/to/the/base-model"' in code
    exec(code.replace("path/to/the/base-model", str(base)), {})
    return capsys.readouterr().out


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
def test_the_python_of_a_page_runs(
    hub: Any,
    tiny_model_folder: Path,
    problem_type: str,
    learned: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = learned(BertModel.from_pretrained(tiny_model_folder), 0)
    model.start_task('it\'s "mood"', label_names=["good", "bad"], problem_type=problem_type)
    model.finish_task()
    model.set_task(None)
    model.push_to_hub("user/adapters")
    card = ModelCard(hub.files("user/adapters")["README.md"].decode())
    printed = runs(card, tiny_model_folder, capsys)
    assert re.fullmatch(r"\{'good': -?[\d.e-]+, 'bad': -?[\d.e-]+\}\n", printed)


@pytest.mark.parametrize("name", ["DINOv2", "T5", "Llama"])
def test_the_python_of_a_page_runs_for_every_type_of_task(
    hub: Any,
    families: Any,
    recognising: Any,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family = families[name]
    model = recognising(family, 2)
    model.push_to_hub("user/adapters")
    base = model.detach()
    base.save_pretrained(tmp_path / "base")
    size = getattr(base.config, "image_size", 0)

    def processed(*_: Any, **__: Any) -> dict[str, Any]:
        return family.batch(seed=0, size=1)

    class Processor:
        __call__ = staticmethod(processed)
        from_pretrained = classmethod(lambda cls, source: cls())
        batch_decode = staticmethod(lambda tokens, **_: [str(tokens.shape)])

    for auto in ("AutoTokenizer", "AutoImageProcessor"):  # tiny models have none
        monkeypatch.setattr(f"transformers.{auto}", Processor)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (size or 4, size or 4)).save("picture.png")
    printed = runs(ModelCard(hub.files("user/adapters")["README.md"].decode()), tmp_path / "base", capsys)
    assert printed.startswith("{'0': " if name == "DINOv2" else "torch.Size([1, ")


@pytest.mark.parametrize("chat", [False, True])
def test_the_python_of_a_page_asks_in_the_template(
    families: Any,
    recognising: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hub: Any,
    chat: bool,
) -> None:
    model = recognising(families["Llama"], 2)
    asked = {name: Asked("It's `{text}`\n```\n|", ("good", "bad"), chat) for name in model.tasks}
    card, unknown = card_of(model, asked=asked), card_of(model)
    model.push_to_hub("user/adapters")
    base = model.detach()
    base.save_pretrained(tmp_path / "base")
    read: list[Any] = []

    class Processor:
        from_pretrained = classmethod(lambda cls, source: cls())
        batch_decode = staticmethod(lambda tokens, **_: [str(tokens.shape)])

        def __call__(self, text: str, **how: Any) -> dict[str, Any]:
            read.append((text, how.get("add_special_tokens", True)))
            return families["Llama"].batch(seed=0, size=1)

        def apply_chat_template(self, said: list[dict[str, str]], *, tokenize: bool, **how: Any) -> str:
            assert not tokenize and how == {"add_generation_prompt": True} and said[0]["role"] == "user"
            return f"<{said[0]['content']}>"

    monkeypatch.setattr("transformers.AutoTokenizer", Processor)
    assert runs(card, tmp_path / "base", capsys).startswith("torch.Size([1, ")
    whole = "It's `a text`\n```\n|"
    assert read == [(f"<{whole}>", False) if chat else (whole, True)]
    assert "answer with one of 'good', 'bad'" in card.text and "| good, bad |" in card.text
    assert ("chat template" in card.text) is chat and "not in the checkpoint" not in card.text
    assert "are not in the checkpoint" in unknown.text and "answer with one of" not in unknown.text


def test_the_header_and_the_page_say_what_it_is(tiny_bert: Any, learned: Any) -> None:
    model = learned(tiny_bert, 2, rank=2)
    result = EvalResult("text-classification", "task-0", "task-0", "accuracy", 0.8125, dataset_split="test")
    more = {"results": [result], "data_license": "cc0-1.0", "card_data": {"license": "mit", "language": "en"}}
    card = card_of(model, base_model="sentence-transformers/all-MiniLM-L6-v2", **more)
    data = card.data.to_dict()
    assert data["library_name"] == "qtuning_fast" and data["license"] == "mit" and data["language"] == "en"
    assert data["base_model"] == "sentence-transformers/all-MiniLM-L6-v2" and "adapter" in data["tags"]
    assert card.data.eval_results[0].metric_value == 0.8125 and data["metrics"] == ["accuracy"]
    for said in (
        "# adapters",
        model.backbone.fingerprint,
        "`BertModel`",
        "| task-1 | one class | 0, 1, 2 |",
        "| rank | `2` |",
        "| task-0 | accuracy | 0.812 |",
        "- Adapters: mit.",
        "- Data of the tasks: cc0-1.0.",
        'from_pretrained(base, "user/adapters")',
    ):
        assert said in card.text, said
    assert is_written_by_us(str(card)) and not is_written_by_us("# Mine")
    alone = model_card(checkpoint_of(model).of_task("task-1"), "user/adapters")
    assert "Adapters of 1 task " in alone.text and "task-0" not in alone.text and "queue of prompts" in alone.text
    assert alone.data.eval_results is None and "Licences" in alone.text and "not stated" in alone.text


def test_a_page_of_no_task_yet(tiny_bert: Any, learned: Any) -> None:
    card = card_of(learned(tiny_bert, 0))
    assert "Adapters of 0 tasks" in card.text and "print(model.tasks)" in card.text


def test_names_cannot_leave_their_cell(tiny_bert: Any, learned: Any) -> None:
    model = learned(tiny_bert, 0)
    model.start_task("a | b\n# not a heading\n```", label_names=["<script>", "[x](http://y)"])
    model.finish_task()
    model.set_task(None)
    text = card_of(model).text
    assert r"| a \| b # not a heading ``` | one class | \<script\>, \[x\](http://y) |" in text
    assert "\n# not a heading" not in text.replace(r"\n", "")


def test_a_folder_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in (None, "", str(tmp_path / "model"), "/no/longer/there", "a/b/c", str(tmp_path)):
        assert on_the_hub(name) is None
    assert on_the_hub("bert-base-uncased") == "bert-base-uncased" and on_the_hub("user/model") == "user/model"


def test_metadata_that_are_wrong(tiny_bert: Any, learned: Any) -> None:
    model = learned(tiny_bert, 1)
    with pytest.raises(ValueError, match="it must be user/name"):
        model_card(checkpoint_of(model), "a name")
    with pytest.raises(ValueError, match="eval_results"):
        card_of(model, card_data={"eval_results": ["x"]})
