"""Checks before a run: what would fail in training fails before the run's folder exists."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch

from qtuning_fast.lifelong.data.encoded import FALLBACK_PAD_TOKEN, EncodedExamples
from qtuning_fast.lifelong.data.encoding import ExampleEncoder
from qtuning_fast.lifelong.data.tables import DataWarning
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.model.model import QTuningModel

_PACKAGES = {"accelerate": "accelerate", "sklearn": "scikit-learn"}  # by module
_LONGEST_NAME = 200  # characters; it names the task's folder, and file systems allow 255 bytes


def preflight(
    model: QTuningModel,
    encoder: ExampleEncoder,
    tasks: Sequence[Task],
    encode: Callable[[Task], dict[str, EncodedExamples]],
) -> None:
    """Check the inputs of every task, and train on one example of the first.

    Args:
        model: a fresh model that nothing else uses.
        encoder: the encoder of the run.
        tasks: the tasks of the run.
        encode: returns the encoded splits of a task.

    Warns:
        DataWarning: the tokenizer has no padding token.

    Raises:
        ImportError: a package that training needs is missing.
        ValueError: a task's name is too long, the tokenizer does not belong to the model, or training fails.
    """
    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise ImportError(f"a run needs the package {package}: pip install {package}")
    for task in tasks:
        if len(task.name) > _LONGEST_NAME:
            raise ValueError(f"task {task.name[:40]!r}... has a name of more than {_LONGEST_NAME} characters")
        _check_tokens(model, encoder, task, encode(task))
    task = tasks[0]
    try:
        _train_one_step(model, encoder, task, encode(task)["train"])
    except (TypeError, ValueError, RuntimeError, LookupError, NotImplementedError) as error:
        name = type(model.base_model).__name__
        raise ValueError(f"this {name} cannot learn task {task.name!r}: {error}") from error
    if not encoder.reads_images and encoder.processor.pad_token_id is None:
        warnings.warn(
            f"this model's tokenizer has no padding token; token {FALLBACK_PAD_TOKEN} pads instead, hidden by the mask",
            DataWarning,
            stacklevel=3,
        )


def _check_tokens(model: QTuningModel, encoder: ExampleEncoder, task: Task, splits: dict[str, EncodedExamples]) -> None:
    if encoder.reads_images:
        return
    known = getattr(model.base_model.get_input_embeddings(), "num_embeddings", None)
    highest = max(
        (max(answer) for answer in encoder.encode_answers(task.answers, task=task.name) or () if answer), default=0
    )
    for split, inputs in splits.items():
        tokens, mask = inputs.columns["input_ids"], inputs.columns["attention_mask"]
        empty = (mask.sum(1) == 0).nonzero()
        if len(empty):
            text = getattr(task, split).inputs[int(empty[0])]
            raise ValueError(f"task {task.name!r}: the text {str(text)[:40]!r} has no tokens; leave it out")
        highest = max(highest, int(tokens.max()))
    if known is not None and highest >= known:
        raise ValueError(
            f"task {task.name!r}: the tokenizer has a token {highest}, but the model has only {known} tokens; "
            "they do not belong together"
        )


def _train_one_step(model: QTuningModel, encoder: ExampleEncoder, task: Task, inputs: EncodedExamples) -> None:
    answers = encoder.encode_answers(task.answers, task=task.name)
    training_inputs = inputs if answers is None else encoder.encode_with_answers(task.train, answers, task.template)
    model.features(next(inputs.batches(1, model.device)), task=None)
    model.start_task(task.name, label_names=task.label_names, problem_type=task.problem_type)
    with torch.enable_grad():
        model(
            **{name: column.to(model.device) for name, column in training_inputs.rows(slice(1)).items()}
        ).loss.backward()
