"""The task that is set, and whose prefix stands on the layers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.integrations.transformers import PrefixInjector
from qtuning_fast.method.prefix import Prefix, placed
from qtuning_fast.model.active_task import ActiveTask
from qtuning_fast.model.chosen_tasks import SetTask

Batch = dict[str, Tensor]
SMALL = {"prompt_length": 3, "queue_size": 3, "shared_length": 2}


def small_config(**changes: Any) -> QTuningConfig:
    return QTuningConfig(**(SMALL | changes))


def test_the_task_set_survives_a_mixed_batch(tiny_bert: BertModel, batch: Batch, learn: Any, logits: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 2)
    expected = logits(model, batch, "task-1")
    model(**batch, task_names=["task-0"] * 4)
    assert torch.equal(model(**batch).logits, expected)


def test_no_task_is_set_while_a_mixed_batch_computes(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=3, queue_size=6))
    learn(model, batch, tasks=2)
    names = ["task-0", "task-1"] * 2
    with torch.no_grad():
        expected, features = model(**batch, task_names=names).logits, model.features(batch, task="task-1")

        def interrupt(*_: Any) -> None:
            hook.remove()
            assert torch.equal(model.features(batch, task="task-1"), features)  # which restores what was set
            with pytest.raises(RuntimeError, match="while a batch of several tasks computes"):
                model.set_task("task-0")

        hook = tiny_bert.encoder.layer[1].register_forward_pre_hook(interrupt)
        assert torch.equal(model(**batch, task_names=names).logits, expected)
    assert model.active_task == "task-1"
    model.set_task("task-0")


def test_what_stands_on_the_layers_moves_with_the_model(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    model.to("meta")
    assert model.backbone.injector.layers[0].module.qtuning_prefix["prefix_key"].device.type == "meta"


def test_the_task_that_is_set_stands_as_before(tiny_bert: BertModel, batch: Batch, learned: Any) -> None:
    model = learned(tiny_bert, 2)
    model.set_task("task-1")
    expected, layer = model(**batch).logits, model.backbone.injector.layers[0].module
    before = layer.qtuning_prefix["prefix_key"].data_ptr()
    model(**batch, task_names=["task-0", "task-1"] * 2)
    assert layer.qtuning_prefix["prefix_key"].data_ptr() == before  # nothing was moved to the device again
    assert torch.equal(model(**batch).logits, expected)


class Layers:
    """A BERT of three layers, of which the task that is set has the first and the last."""

    def __init__(self, base: BertModel, batch: Batch) -> None:
        self.injector = PrefixInjector(base)
        self.asked: list[tuple[str, bool]] = []
        self.active = ActiveTask(self.injector, [0, 2], self.prefix_of)
        self._base, self._batch = base, batch

    def prefix_of(self, task: SetTask) -> Prefix:
        """Rows that are full of the number in the task's name."""
        self.asked.append((task.name, task.is_live))
        rows = torch.full((4, 2, 8), float(task.name))
        return Prefix([{"prefix_key": rows, "prefix_value": rows, "gate": None}] * 2)

    @torch.no_grad()
    def states(self) -> Tensor:
        return self._base(**self._batch).last_hidden_state

    @property
    def numbers(self) -> list[float | None]:
        """What stands on each layer."""
        standing = [placed(layer.module) for layer in self.injector.layers]
        return [None if prefix is None else prefix["prefix_key"][0, 0, 0].item() for prefix in standing]


@pytest.fixture
def layers(tiny_bert: BertModel, batch: Batch) -> Layers:
    return Layers(tiny_bert, batch)


def test_a_task_puts_its_prefix_on_its_layers_and_none_takes_it_off(layers: Layers) -> None:
    plain = layers.states()
    assert layers.active.task is None and layers.active.name is None
    layers.active.set("1")
    assert layers.active.name == "1" and layers.numbers == [1, None, 1]
    assert not torch.allclose(layers.states(), plain)
    layers.active.set("2", live=True)
    assert layers.active.task.is_live and layers.numbers == [2, None, 2]
    layers.active.set(None)
    assert layers.active.task is None and layers.active.name is None and layers.numbers == [None] * 3
    assert torch.equal(layers.states(), plain)
    assert layers.asked == [("1", False), ("2", True)]


def test_placing_asks_for_the_prefix_as_it_is_now(layers: Layers) -> None:
    layers.active.set("1", live=True)
    layers.active.place()
    assert layers.asked == [("1", True)] * 2


@pytest.mark.parametrize("before", ["1", None])
def test_after_a_block_the_task_is_set_that_was_set_before(layers: Layers, before: str | None) -> None:
    layers.active.set(before)
    expected = layers.states()
    with pytest.raises(KeyError), layers.active.kept():
        layers.active.set("2", live=True)
        raise KeyError
    assert layers.active.name == before and not (layers.active.task and layers.active.task.is_live)
    assert torch.equal(layers.states(), expected) and ("2", True) in layers.asked


@pytest.mark.parametrize("before", ["1", None])
def test_a_task_whose_prefix_cannot_be_made_leaves_the_one_before(layers: Layers, before: str | None) -> None:
    layers.active.set(before)
    expected = layers.states()
    with pytest.raises(ValueError, match="could not convert"):
        layers.active.set("no number")
    assert layers.active.name == before and torch.equal(layers.states(), expected)


@pytest.mark.parametrize("detached", [False, True])
def test_a_model_that_is_gone_leaves_no_adapter_and_no_prefix_behind(tiny_config: Any, detached: bool) -> None:
    """A context keeps its variables for ever, so what they hold must be nothing of the model's."""
    model = QTuningModel(BertModel(tiny_config()), QTuningConfig(prompt_length=3, queue_size=2, shared_length=2))
    model.start_task("first", 2)
    model.finish_task()
    model(input_ids=torch.ones(1, 3, dtype=torch.long))
    task = model._active.current
    assert task is not None and task.adapter is not None and task.placed is not None
    kept = [weakref.ref(each) for each in (task, task.adapter, task.placed[1])]
    del task
    if detached:
        model.detach()
    del model
    gc.collect()
    assert [each() for each in kept] == [None, None, None]
