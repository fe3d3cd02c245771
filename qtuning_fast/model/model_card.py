"""The model card of a checkpoint: `README.md` of its repository, for people and, in its header, for the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from qtuning_fast.method.adapter import AdapterInfo
from qtuning_fast.method.config import HEAD_TASK_TYPES
from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE
from qtuning_fast.model.checkpoint import Checkpoint
from qtuning_fast.model.hub_files import check_repo_id, is_repo_id
from qtuning_fast.version import __version__

CARD_FILE = "README.md"

_OURS = "<!-- qtuning_fast writes this page anew with each push. To keep your own text, delete this line. -->"
_BASE = "path/to/the/base-model"
PIPELINES = {  # what the hub calls the task types
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
    "text-to-text": "text2text-generation",
    "causal-lm": "text-generation",
}
_AUTO = {"text-to-text": "AutoModelForSeq2SeqLM", "causal-lm": "AutoModelForCausalLM"}
_KINDS = {SINGLE: "one class", MULTI: "any number of classes", REGRESSION: "numbers"}
_OUTPUTS = {SINGLE: "softmax(-1)[0]", MULTI: "sigmoid()[0]", REGRESSION: "[0]"}


@dataclass(frozen=True)
class Asked:
    """How a language model is asked about a task.

    Attributes:
        template: what it reads, in which `{text}` is the example; None: the example alone.
        words: what it answers with, one a class; empty: they are not known.
        chat: whether that is the user's message in the tokenizer's chat template.
    """

    template: str | None = None
    words: tuple[str, ...] = ()
    chat: bool = False


def model_card(
    saved: Checkpoint,
    repo_id: str,
    *,
    base_model: str | None = None,
    results: Sequence[EvalResult] = (),
    data_license: str | None = None,
    card_data: Mapping[str, Any] | None = None,
    asked: Mapping[str, Asked] | None = None,
) -> ModelCard:
    """Return the model card of a checkpoint. `ModelCard.save` writes it into a file.

    Args:
        saved: the checkpoint.
        repo_id: the repository that it is for.
        base_model: the name of the base model on the hub; a folder's name, which others do not have, is left out.
        results: what was measured.
        data_license: the licence of the data that the tasks were learned from, if it is known.
        card_data: further metadata, or other than the card's own, in the words of `huggingface_hub.ModelCardData`.
        asked: how a language model is asked about each task; None: that is not known, which the card then says.

    Raises:
        ValueError: metadata are invalid, or the name cannot be that of a repository.
    """
    check_repo_id(repo_id)
    base = on_the_hub(base_model)
    data: dict[str, Any] = {
        "library_name": "qtuning_fast",
        "base_model": base,
        "pipeline_tag": PIPELINES[saved.config.task_type],
        "tags": ["qtuning_fast", "q-tuning", "prompt-tuning", "adapter", "continual-learning"],
        "model_name": repo_id.rpartition("/")[2],
        "eval_results": list(results) or None,
        "metrics": sorted({result.metric_type for result in results}) or None,
    }
    try:
        header = ModelCardData(**data | dict(card_data or {}))
    except TypeError as error:
        raise ValueError(f"card_data is {card_data!r}: {error}") from None
    parts = [
        _OURS,
        f"# {repo_id.rpartition('/')[2]}",
        _summary(saved, base),
        "## Use it",
        f"```python\n{snippet(saved, repo_id, base, asked)}```",
        "## Tasks",
        _table(["task", "an answer is", "classes"], [_row(entry.info) for entry in saved.adapters.entries()]),
        *_questions(saved, asked),
        *_measured(results),
        "## Method and settings",
        "Q-tuning ([2404.14607](https://arxiv.org/abs/2404.14607)) with NoRGa's gate "
        f"([2405.14124](https://arxiv.org/abs/2405.14124)), by qtuning_fast {__version__}.",
        _table(["setting", "value"], [[name, f"`{value}`"] for name, value in saved.config.to_dict().items()]),
        "## Licences",
        f"- Adapters: {header.license or 'not stated'}.\n- Base model: see its own page.\n"
        f"- Data of the tasks: {data_license or 'not stated'}.",
    ]
    body = "\n\n".join(parts)
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}\n")


def is_written_by_us(page: str) -> bool:
    """Return whether a model card is one that may be written anew."""
    return _OURS in page


def on_the_hub(name: str | None) -> str | None:
    """Return the name of a base model, or None for a folder, which others do not have."""
    return name if name and not Path(name).exists() and is_repo_id(name) else None


def snippet(saved: Checkpoint, repo_id: str, base: str | None, asked: Mapping[str, Asked] | None = None) -> str:
    """Return Python that loads the base model and the checkpoint, and asks the first task.

    Args:
        saved: the checkpoint.
        repo_id: its repository.
        base: the base model's name on the hub; None: it is said that the reader must know.
        asked: how a language model is asked about each task, if that is known.
    """
    task_type, images = saved.config.task_type, saved.config.task_type == "image-classification"
    kind = saved.base_model if hasattr(transformers, saved.base_model) else _AUTO.get(task_type, "AutoModel")
    processor, loader = ("processor", "AutoImageProcessor") if images else ("tokenizer", "AutoTokenizer")
    lines = [
        f"from transformers import {', '.join(sorted({kind, loader}, key=str.lower))}",
        "from qtuning_fast import QTuningModel",
        "",
        f'base = {kind}.from_pretrained("{base or _BASE}")'
        + ("" if base else f"  # its fingerprint begins with {saved.fingerprint[:12]}"),
        f'{processor} = {loader}.from_pretrained("{base or _BASE}")',
        f'model = QTuningModel.from_pretrained(base, "{repo_id}").eval()',
    ]
    if not len(saved.adapters):
        return "\n".join([*lines, "print(model.tasks)", ""])
    info = saved.adapters.entries()[0].info
    lines += ["", f"model.set_task({info.name!r})"]
    if images:
        lines = ["from PIL import Image", *lines, 'inputs = processor(Image.open("picture.png"), return_tensors="pt")']
    elif task_type in HEAD_TASK_TYPES:
        lines.append('inputs = tokenizer("a text", return_tensors="pt")')
    else:
        lines += _question((asked or {}).get(info.name))
    if task_type in HEAD_TASK_TYPES and info.classes:
        lines += [
            f"outputs = model(**inputs).logits.detach().{_OUTPUTS[info.problem_type]}".replace(".[", "["),
            f"print(dict(zip(model.label_names({info.name!r}), outputs.tolist())))",
        ]
    elif task_type in HEAD_TASK_TYPES:
        lines.append("print(model.encode(inputs).shape)  # the task is a prompt without a head")
    else:
        lines += [
            "tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)",
            "print(tokenizer.batch_decode(tokens, skip_special_tokens=True)[0])",
        ]
    return "\n".join([*lines, ""])


def _question(asked: Asked | None) -> list[str]:
    """Return Python that asks a language model as it was asked in training."""
    if asked is None:
        return ['inputs = tokenizer("a text", return_tensors="pt")  # in the template of its training, if it had one']
    lines = ['text = "a text"']
    if asked.template is not None:
        lines.append(f'text = {asked.template!r}.replace("{{text}}", text)')
    if asked.chat:
        lines += [
            'message = [{"role": "user", "content": text}]',
            "text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)",
            'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")',
        ]
    else:
        lines.append('inputs = tokenizer(text.rstrip(), return_tensors="pt")')
    if asked.words:
        lines.append(f"# it was taught to answer with one of {', '.join(map(repr, asked.words))}")
    return lines


def _summary(saved: Checkpoint, base: str | None) -> str:
    count, kind = len(saved.adapters), saved.config.task_type
    model = f"[{base}](https://huggingface.co/{base})" if base else "a base model that is not named here"
    said = (
        f"Adapters of {count} {'task' if count == 1 else 'tasks'} ({kind}) for {model}, a `{saved.base_model}` with "
        f"the fingerprint `{saved.fingerprint}`: other weights are refused. Each adapter is a prompt inside "
        "attention, with a gate and perhaps a head; the base model stays as it is. Files are safetensors and JSON."
    )
    if len(saved.statistics):
        said += (
            " With the adapters come statistics of the tasks' examples, by which the task of an input is inferred: "
            "counts, means and scatter of features, and feature vectors of up to 64 validation examples a task."
        )
    if saved.is_of_one_task:
        said += " The queue of prompts, from which further tasks are learned, is not here."
    return said


def _questions(saved: Checkpoint, asked: Mapping[str, Asked] | None) -> list[str]:
    """Return how a language model is to be asked about each task."""
    if saved.config.task_type in HEAD_TASK_TYPES or not len(saved.adapters):
        return []
    if asked is None:
        return [
            "How texts were put to the model (a template, the tokenizer's chat template) and the words of its answers "
            "are not in the checkpoint: ask as in training, or answers are worse."
        ]
    rows = [
        [name, f"`{each.template!r}`" if each.template else "the text alone", ", ".join(each.words) or "not known"]
        for name, each in asked.items()
    ]
    chat = any(each.chat for each in asked.values())
    return [
        "What the model reads, with an example in place of `{text}`"
        + (", as the user's message in the tokenizer's chat template" if chat else "")
        + ", and the words that it was taught to answer with:",
        _table(["task", "it reads", "it answers"], rows),
    ]


def _row(info: AdapterInfo) -> list[str]:
    what = _KINDS[info.problem_type] if info.classes else "text, or features"
    return [info.name, what, ", ".join(info.label_names) or "none"]


def _measured(results: Sequence[EvalResult]) -> list[str]:
    if not results:
        return []
    rows = [[each.dataset_name, each.metric_name or each.metric_type, f"{each.metric_value:.3f}"] for each in results]
    return ["## Measured on test examples", _table(["task", "measure", "value"], rows)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Return a text that cannot leave its cell, whatever tasks and classes are called."""
    return re.sub(r"([|<>\[\]])", r"\\\1", " ".join(text.split()))
