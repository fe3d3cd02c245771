"""Copies and pickles of a model with a task set, and of its base model alone."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 3, "shared_length": 1, "reparameterization": None, "retention_weight": 0.0}


def saved_and_loaded(model: QTuningModel) -> QTuningModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.fixture(params=COPIES)
def copied(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return COPIES[request.param]


def step(model: QTuningModel, family: Any) -> list[Tensor]:
    """The loss and the gradients of one step, and the step."""
    inputs = family.batch()
    labels = inputs["input_ids"] if family.kind == "decoder" else torch.arange(3)
    loss = model(**inputs, labels=labels).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = [loss.detach(), *torch.autograd.grad(loss, trained)]
    with torch.no_grad():
        for parameter, gradient in zip(trained, found[1:]):
            parameter.sub_(gradient, alpha=0.1)
    return found


@pytest.mark.parametrize("placement", ["prefix", "input"])
@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_copy_in_training_goes_on_as_the_model_does(
    families: Any, name: str, placement: str, checkpointing: bool, copied: Any
) -> None:
    family = families[name]
    model = QTuningModel(family.base_model(), QTuningConfig(**SMALL, placement=placement, task_type=family.task_type))
    model.start_task("first", 3)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for _ in range(2):  # before and after a step
        other = copied(model)
        assert other.active_task == "first" and other.training
        assert other.backbone.injector.checkpoints == checkpointing
        for mine, its in zip(step(model, family), step(other, family)):
            torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("placement", ["prefix", "input"])
@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
def test_a_copy_under_a_finished_task_answers_alike_and_learns_by_itself(
    families: Any, name: str, placement: str, copied: Any
) -> None:
    family = families[name]
    model = QTuningModel(family.base_model(), QTuningConfig(**SMALL, placement=placement, task_type=family.task_type))
    model.start_task("first", 3)
    model.finish_task()
    model.eval()
    expected = model(**family.batch()).logits
    other = copied(model)
    assert torch.equal(other(**family.batch()).logits, expected)
    other.start_task("second", 3)
    step(other, family)
    other.finish_task()
    other.set_task(None)
    assert model.tasks == ["first"] and torch.equal(model(**family.batch()).logits, expected)
    assert torch.equal(other.base_model(**family.batch())[0], other.detach()(**family.batch())[0])


def test_the_base_model_is_copied_alone_only_while_no_task_is_set(families: Any, copied: Any) -> None:
    family = families["BERT"]
    model = QTuningModel(family.base_model(), QTuningConfig(**SMALL))
    model.start_task("first", 3)
    with pytest.raises(RuntimeError, match=r"copy or pickle the QTuningModel, or call set_task\(None\)"):
        copied(model.base_model)
    assert model.active_task == "first" and model(**family.batch()).logits.shape == (3, 3)
    model.set_task(None)
    other = copied(model.base_model)
    assert torch.equal(other(**family.batch())[0], model.base_model(**family.batch())[0])
    QTuningModel(other, QTuningConfig(**SMALL))  # nothing is attached to the copy
    with pytest.raises(ValueError, match="attached already"):
        QTuningModel(model.base_model, QTuningConfig(**SMALL))
