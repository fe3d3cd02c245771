"""An optimizer of a finished task is refused while the next one trains; any other is left alone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.model import stale_optimizers

LABELS = torch.tensor([0, 1, 2, 0])
Batch = dict[str, Tensor]


def started(tiny_bert: BertModel) -> QTuningModel:
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=3, queue_size=2, shared_length=2, retention_weight=0.0))
    model.start_task("first", 3)
    return model.train()


def optimizer_of(model: QTuningModel) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def step(model: QTuningModel, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    model(**batch, labels=LABELS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_optimizer_of_the_task_before_is_refused_and_a_new_one_is_not(tiny_bert: BertModel, batch: Batch) -> None:
    model = started(tiny_bert)
    optimizer = optimizer_of(model)
    step(model, optimizer, batch)
    model.finish_task()
    model.start_task("second", 3)
    with pytest.raises(RuntimeError, match=r"parameters of a finished task but not all of those of task 'second'.*new"):
        step(model, optimizer, batch)
    step(model, optimizer_of(model), batch)
    for parameter in model.parameters():
        if parameter.requires_grad:
            optimizer.add_param_group({"params": [parameter]}) if not holds(optimizer, parameter) else None
    step(model, optimizer, batch)  # it holds the old ones beside all of the new ones


def holds(optimizer: torch.optim.Optimizer, parameter: Any) -> bool:
    return any(parameter is each for group in optimizer.param_groups for each in group["params"])


def test_between_tasks_and_after_the_model_an_old_optimizer_may_step(tiny_bert: BertModel, batch: Batch) -> None:
    model = started(tiny_bert)
    optimizer = optimizer_of(model)
    step(model, optimizer, batch)
    model.finish_task()
    optimizer.step()
    model.start_task("second", 3)
    model.detach()
    del model
    gc.collect()
    optimizer.step()


def test_parameters_that_nobody_holds_are_forgotten(tiny_bert: BertModel) -> None:
    model = started(tiny_bert)
    before = len(stale_optimizers._FINISHED)
    model.finish_task()
    gc.collect()
    assert len(stale_optimizers._FINISHED) <= before
