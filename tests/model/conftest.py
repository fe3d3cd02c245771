"""What several test files need: the families of tests/integrations, and models that have learned tasks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtuning_fast import QTuningConfig, QTuningModel

_spec = importlib.util.spec_from_file_location("families", Path(__file__).parents[1] / "integrations" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_families = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _families  # its dataclasses look there
_spec.loader.exec_module(_families)
families, family = _families.families, _families.family

Batch = dict[str, Tensor]


@pytest.fixture(scope="session")
def attributes() -> Callable[[nn.Module], list[tuple[str, list[str], bool]]]:
    """`attributes(model)` lists each module's name, attributes and mode, by which a model is as it was."""
    return lambda model: [(name, sorted(vars(module)), module.training) for name, module in model.named_modules()]


# Tasks that are trained


def _train(model: QTuningModel, batch: Batch, steps: int = 3) -> None:
    labels = torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.eval()


def _learn(model: QTuningModel, batch: Batch, tasks: int, steps: int = 3) -> None:
    for _ in range(tasks):
        model.start_task(f"task-{len(model.tasks)}", 2)
        _train(model, batch, steps)
        model.finish_task()


@torch.no_grad()
def _logits(model: QTuningModel, batch: Batch, task: str | None, *, live: bool = False) -> Tensor:
    model.set_task(task, live=live)
    return model(**batch).logits


@pytest.fixture(scope="session")
def train() -> Callable[..., None]:
    """`train(model, batch, steps=3)` takes some steps of the task in training, with fixed labels."""
    return _train


@pytest.fixture(scope="session")
def learn() -> Callable[..., None]:
    """`learn(model, batch, tasks, steps=3)` trains and finishes so many tasks more."""
    return _learn


@pytest.fixture(scope="session")
def logits() -> Callable[..., Tensor]:
    """`logits(model, batch, task, live=False)` computes under a task and leaves it set."""
    return _logits


# Tasks at random


def _learned(base: Any, tasks: int, seed: int = 1, **changes: Any) -> QTuningModel:
    torch.manual_seed(seed)
    small = {"prompt_length": 2, "queue_size": 3, "shared_length": 1, "reparameterization": None}
    model = QTuningModel(base, QTuningConfig(**(small | changes)))
    for number in range(tasks):
        model.start_task(f"task-{number}", 2 + number % 3)
        with torch.no_grad():
            for parameter in [*model.training_prefix.parameters(), *model.head.parameters()]:
                parameter.add_(torch.randn_like(parameter) * 0.5)
        model.finish_task()
    model.set_task(None)
    return model


@torch.no_grad()
def _each_by_itself(model: QTuningModel, batch: Batch, names: list[str]) -> list[Tensor]:
    found = []
    for row, name in enumerate(names):
        model.set_task(name)
        found.append(model(**batch).logits[row])
    model.set_task(None)
    return found


@torch.no_grad()
def _assert_as_by_itself(model: QTuningModel, batch: Batch, names: list[str], **tolerance: float) -> None:
    mixed = model(**batch, task_names=names).logits
    for row, expected in enumerate(_each_by_itself(model, batch, names)):
        assert mixed[row, len(expected) :].isneginf().all()
        torch.testing.assert_close(mixed[row, : len(expected)], expected, **tolerance)


@pytest.fixture(scope="session")
def learned() -> Callable[..., QTuningModel]:
    """`learned(base, tasks, seed=1, **config)` makes a model with finished tasks at random, none of which is set.

    The prefixes of the first ones are shorter, and heads have two, three or four classes.
    """
    return _learned


@pytest.fixture(scope="session")
def each_by_itself() -> Callable[..., list[Tensor]]:
    """`each_by_itself(model, batch, names)` computes each sample's logits under its own task, one task at a time."""
    return _each_by_itself


@pytest.fixture(scope="session")
def assert_as_by_itself() -> Callable[..., None]:
    """`assert_as_by_itself(model, batch, names, **tolerance)` holds a mixed batch against `each_by_itself`."""
    return _assert_as_by_itself


# Tasks whose inputs are recognised

_KINDS = ("BERT", "DINOv2", "T5", "Llama", "GPT-2")  # the last with heads, a decoder that classifies


@pytest.fixture(params=_KINDS)
def kind(request: pytest.FixtureRequest, families: Any) -> Any:
    """A family of each kind: text encoder, image model, encoder-decoder, decoder, decoder with heads."""
    return families[request.param]


def _inputs_of(family: Any, task: int, size: int = 6, seed: int = 0) -> Batch:
    """Inputs that their tokens, or where they are bright, tell from those of other tasks."""
    batch: Batch = family.batch(seed=10 * seed + task, size=size)
    if family.kind == "image":
        pixels = 0.3 * batch["pixel_values"]
        pixels.chunk(3, dim=(-2, -1, 1)[task])[task].add_(2.0)  # below, on the left, or in one colour
        return {"pixel_values": pixels}
    ids = batch["input_ids"]
    return batch | {"input_ids": torch.where(batch["attention_mask"] != 0, 5 + 11 * task + ids % 11, ids)}


def _recognising(family: Any, tasks: int = 3, **changes: Any) -> QTuningModel:
    torch.manual_seed(1)
    small = {"prompt_length": 2, "queue_size": 3, "shared_length": 1, "reparameterization": None}
    task_type = "sequence-classification" if family.name == "GPT-2" else family.task_type
    small |= {"retention_weight": 0.0, "task_type": task_type}
    model = QTuningModel(family.base_model(), QTuningConfig(**(small | changes)))
    for number in range(tasks):
        model.start_task(f"task-{number}", 2 + number if model.has_heads else None)
        with torch.no_grad():
            for parameter in model.learning.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.5)
        model.finish_task()
        labels = {"labels": torch.arange(24) % (2 + number)}
        model.record_statistics(
            f"task-{number}",
            [_inputs_of(family, number, 24) | labels],
            validation=[_inputs_of(family, number, 24, seed=1) | labels],
        )
    model.set_task(None)
    return model.eval()


@pytest.fixture(scope="session")
def inputs_of() -> Callable[..., Batch]:
    """`inputs_of(family, task, size=6, seed=0)` draws inputs of one of the tasks 0, 1, 2 of `recognising`."""
    return _inputs_of


@pytest.fixture(scope="session")
def recognising() -> Callable[..., QTuningModel]:
    """`recognising(family, tasks=3, **config)` makes a model with tasks at random and with their statistics.

    They have two, three and four classes where tasks have heads. None is set.
    """
    return _recognising
