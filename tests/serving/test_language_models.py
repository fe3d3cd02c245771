"""A language model is served, too: its answer is the most probable of the words for its classes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from qtuning_fast import QTuningConfig
from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.lifelong.runs import RunSettings, run_stream
from qtuning_fast.lifelong.saved_run import SavedRun
from qtuning_fast.model.checked_files import read_json
from qtuning_fast.serving.engine import Engine
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.schema import Answer, Asked, Refused, SentAdapter

WORDS = [
    "red",
    "green",
    "blue",
    "yellow",
    "cat",
    "dog",
    "horse",
    "the",
    "a",
    "is",
    "was",
    "seen",
    "here",
    "there",
    "old",
    "new",
    "very",
]
TEXTS = ("the old red cat", "a dog was here", "very very new")
TEMPLATE = "the {text} is"


@pytest.fixture(scope="module")
def run(toy_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writes")
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "t5")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 48, "vocab_size": len(vocabulary)}
    model = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))
    model.save_pretrained(folder / "t5")
    tasks = tuple(f"{name}={toy_files[name]}" for name in ("colours", "animals"))
    data = DataOptions(tasks=tasks, shots=4, validation_shots=3, test_size=8, templates=(TEMPLATE,))
    method = QTuningConfig(prompt_length=2, shared_length=2, queue_size=2, task_type="text-to-text")
    training = TrainingOptions(steps=2, batch_size=4, max_length=16, eval_every=2, start_from="random")
    settings = RunSettings(str(folder / "t5"), data, method, training)
    run_stream(settings, folder / "run", lambda tasks, title: nullcontext(RunListener()))
    return folder / "run"


def sent(run: Path, label_words: str | None = None, template: str | None = TEMPLATE) -> SentAdapter:
    """The run's first task, as it is sent."""
    index = run / "adapter" / "adapter_config.json"
    entry = read_json(index)["tasks"][0]
    return SentAdapter(
        index.read_bytes(), (run / "adapter" / entry["file"]).read_bytes(), None, entry["name"], label_words, template
    )


def test_answers_are_those_of_the_command_line(run: Path, tmp_path: Path) -> None:
    engine, saved = Engine(run, ServingOptions(adapters=str(tmp_path))), SavedRun(run)
    asked = [Asked(text, task) for text in TEXTS for task in ("colours", "animals", None)]
    for each, reply in zip(asked, engine.answer(asked)):
        assert isinstance(reply, Answer)
        if each.task is None:
            (found,) = saved.infer([each.text])
            task, output = found.task, found.output
        else:
            task, output = each.task, saved.predict([each.text], each.task)[0]
        assert reply.task == task and reply.words == saved.answer(output, task)
        assert list(reply.outputs.values()) == pytest.approx(output.tolist(), abs=1e-4)


def test_added_tasks_bring_their_words(run: Path, tmp_path: Path) -> None:
    engine = Engine(run, ServingOptions(adapters=str(tmp_path)))
    engine.put("as-before", sent(run))
    engine.put("swapped", sent(run, '["red", "green"]'))  # of the labels green and red
    own, same, other = engine.answer([Asked(TEXTS[0], task) for task in ("colours", "as-before", "swapped")])
    assert isinstance(own, Answer) and isinstance(same, Answer) and isinstance(other, Answer)
    assert same.outputs == pytest.approx(own.outputs, abs=1e-4)
    assert list(other.outputs.values()) == pytest.approx(list(own.outputs.values())[::-1], abs=1e-4)
    again = Engine(run, ServingOptions(adapters=str(tmp_path)))
    assert again.answer([Asked(TEXTS[0], "swapped")]) == [other]


def test_added_tasks_bring_their_template(run: Path, tmp_path: Path) -> None:
    engine = Engine(run, ServingOptions(adapters=str(tmp_path)))
    engine.put("bare", sent(run, template=None))
    engine.put("colours", sent(run, template="{text} was the"))  # in place of the run's own
    bare, other = engine.answer([Asked(TEMPLATE.format(text=TEXTS[0]), "bare"), Asked(TEXTS[0], "colours")])
    (own,) = Engine(run, ServingOptions(adapters=str(tmp_path / "none"))).answer([Asked(TEXTS[0], "colours")])
    assert isinstance(own, Answer) and isinstance(bare, Answer) and isinstance(other, Answer)
    assert bare.outputs == pytest.approx(own.outputs, abs=1e-4)
    assert other.outputs != pytest.approx(own.outputs, abs=1e-4)


def test_other_words_or_another_template_are_another_version(run: Path, tmp_path: Path) -> None:
    engine, other = (Engine(run, ServingOptions(adapters=str(tmp_path))) for _ in range(2))
    versions = []
    for words, template in ((None, TEMPLATE), ('["red", "green"]', TEMPLATE), (None, "{text} was the"), (None, None)):
        engine.put("new", sent(run, words, template))
        first, second = (each.answer([Asked(TEXTS[0], "new")])[0] for each in (engine, other))
        assert isinstance(first, Answer) and first == second
        versions.append(first.adapter)
    assert len(set(versions)) == 4
    engine.put("again", sent(run))
    assert engine.task("again").adapter == versions[0]


@pytest.mark.parametrize("template", ["no place", "{text} {text}", "{text}" + " red" * 20])
def test_templates_that_do_not_fit_are_refused(template: str, run: Path, tmp_path: Path) -> None:
    engine = Engine(run, ServingOptions(adapters=str(tmp_path)))
    with pytest.raises(Refused) as caught:
        engine.put("new", sent(run, template=template))
    assert (caught.value.status, caught.value.field) == (422, "template")
    assert engine.tasks().total == 2


@pytest.mark.parametrize("words", ['["cat"]', '["cat", "cat"]', '["cat", 1]', "cat", '["cat", " "]'])
def test_words_that_do_not_fit_are_refused(words: str, run: Path, tmp_path: Path) -> None:
    engine = Engine(run, ServingOptions(adapters=str(tmp_path)))
    with pytest.raises(Refused) as caught:
        engine.put("new", sent(run, words))
    assert (caught.value.status, caught.value.field) == (422, "label_words")
    assert engine.tasks().total == 2
