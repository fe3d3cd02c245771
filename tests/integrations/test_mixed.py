"""Batches of several tasks in every family of models: each sample gets what its task gives by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 3, "shared_length": 1, "reparameterization": None}
CLOSE = {"atol": 5e-5, "rtol": 5e-5}  # sums in another order: a few of float32's roundings of numbers of about 50


def learned(base: Any, tasks: int, **changes: Any) -> QTuningModel:
    """A model with finished tasks, every parameter somewhere at random; the prefixes of the first ones are shorter."""
    model = QTuningModel(base, QTuningConfig(**(SMALL | changes)))
    torch.manual_seed(1)
    for number in range(tasks):
        model.start_task(f"task-{number}", 2 + number % 3)
        with torch.no_grad():
            for parameter in model.training_prefix.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.5)
        model.finish_task()
    model.set_task(None)
    return model


def check(model: QTuningModel, batch: dict[str, Tensor], names: list[str]) -> None:
    with torch.no_grad():
        mixed = model(**batch, task_names=names).logits
        for row, name in enumerate(names):
            model.set_task(name)
            expected, found = model(**batch).logits[row], mixed[row]
            if model.has_heads:
                assert found[len(expected) :].isneginf().all()
                found = found[: len(expected)]
            elif not model.base_model.config.is_encoder_decoder:  # not what a decoder says at padding
                seen = batch["attention_mask"][row].bool()
                expected, found = expected[seen], found[seen]
            torch.testing.assert_close(found, expected, **CLOSE)
            model.set_task(None)


@pytest.mark.parametrize(("placement", "gate_per"), [("prefix", "layer"), ("input", "head")])
def test_each_sample_gets_what_its_task_gives_by_itself(family: Any, placement: str, gate_per: str) -> None:
    changes = {"task_type": family.task_type, "placement": placement, "gate_per": gate_per}
    model, batch = learned(family.base_model(), 4, **changes), family.batch()
    for names in (["task-1", "task-0", "task-1"], ["task-3", "task-1", "task-0"], ["task-0"] * 3):
        check(model, batch, names)


@pytest.mark.parametrize("set_before", [None, "task-2"])
def test_within_a_block_forward_computes_under_its_tasks(family: Any, set_before: str | None) -> None:
    model, batch = learned(family.base_model(), 3, task_type=family.task_type), family.batch()
    names = ["task-1", "task-0", "task-1"]
    with torch.no_grad():
        expected = model(**batch, task_names=names).logits
        model.set_task(set_before)
        with model.using(names, 3):
            torch.testing.assert_close(model(**batch).logits, expected)
            assert model(**batch, task_names=["task-0"] * 3).logits.shape[0] == 3
            torch.testing.assert_close(model(**batch).logits, expected)
    assert model.active_task == set_before


@pytest.mark.parametrize("family", ["Llama", "OPT"], indirect=True)
@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_heads_on_a_decoder(family: Any, placement: str) -> None:
    model = learned(family.base_model(), 3, placement=placement)
    check(model, family.batch(), ["task-2", "task-0", "task-1"])


def test_a_prompt_becomes_rows_without_what_stands_on_the_layers(decoder: Any) -> None:
    """In a causal model the bank keeps the keys and values of embeddings, whichever task is set when it takes them."""
    model, batch = learned(decoder.base_model(), 3, task_type="causal-lm", placement="input"), decoder.batch()
    names = ["task-2", "task-0", "task-1"]
    expected = model(**batch, task_names=names).logits
    for task in (None, "task-0"):
        model.slots.clear()
        model.set_task(task)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch, task_names=["task-2"] * 3)
        assert torch.equal(model(**batch, task_names=names).logits, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["BERT", "Llama"], indirect=True)
@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_on_a_gpu_a_batch_of_known_tasks_waits_for_nothing(family: Any, placement: str) -> None:
    model = learned(family.base_model().cuda(), 3, placement=placement)
    batch = {name: x.cuda() for name, x in family.batch().items()}
    names = ["task-0", "task-2", "task-1"]
    check(model, batch, names)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = model.slots.batch(names).logits(torch.ones(3, model.hidden_size, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.shape == (3, 4)
