"""Batches of several tasks: they compute what each task computes by itself, whatever went through the slots before."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from qtuning_fast import QTuningModel
from qtuning_fast.model.device_slots import AdapterSlots

Batch = dict[str, Tensor]
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def logits(model: QTuningModel, batch: Batch, names: list[str] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**batch, task_names=names).logits


def test_nothing_is_stacked_or_read_a_second_time(
    tiny_bert: BertModel, batch: Batch, monkeypatch: pytest.MonkeyPatch, learned: Any
) -> None:
    model = learned(tiny_bert, 3)
    names = ["task-2", "task-0", "task-1", "task-0"]
    expected = logits(model, batch, names)
    places = {name: tensor.data_ptr() for name, tensor in model.slots._slots.items()}
    for name in ("_write", "_grow"):
        monkeypatch.setattr(AdapterSlots, name, lambda *arguments: pytest.fail("the adapters are there already"))
    assert torch.equal(logits(model, batch, names), expected)
    layer = model.backbone.injector.layers[0].module
    with model.using(names, 4):
        placed = layer.qtuning_prefix
    assert placed["prefix_key"].data_ptr() == places["keys.0"] == model.slots._slots["keys.0"].data_ptr()


def test_the_least_recently_used_slot_goes_first(
    tiny_bert: BertModel, batch: Batch, learned: Any, assert_as_by_itself: Any
) -> None:
    model = learned(tiny_bert, 5)
    logits(model, batch, ["task-3", "task-4"] * 2)
    slot = model.slots.bytes // model.slots.slots
    model.set_memory_limits(device_bytes=3 * slot + 1)
    for names, held in (
        (["task-0", "task-1"] * 2, ["task-0", "task-1"]),
        (["task-2", "task-0"] * 2, ["task-1", "task-0", "task-2"]),
        (["task-3"] * 4, ["task-0", "task-2", "task-3"]),
        (["task-2", "task-3", "task-4", "task-4"], ["task-2", "task-3", "task-4"]),
    ):
        assert_as_by_itself(model, batch, names)
        assert model.slots.held == held and model.slots.slots <= 3 and model.slots.bytes <= 3 * slot
    before = logits(model, batch, ["task-2"] * 4)
    with pytest.raises(
        ValueError, match=rf"4 tasks, but device_bytes={3 * slot + 1} has room for 3.*set_memory_limits"
    ):
        logits(model, batch, ["task-0", "task-1", "task-2", "task-3"])
    assert torch.equal(logits(model, batch, ["task-2"] * 4), before)
    model.set_memory_limits()
    assert_as_by_itself(model, batch, ["task-0", "task-1", "task-2", "task-3"])


def test_slots_grow_with_what_is_used(
    tiny_bert: BertModel, batch: Batch, learned: Any, assert_as_by_itself: Any
) -> None:
    model = learned(tiny_bert, 12)
    logits(model, batch, ["task-0"] * 4)
    few = model.slots.slots
    for first in range(0, 12, 4):
        assert_as_by_itself(model, batch, [f"task-{number}" for number in range(first, first + 4)])
    assert few < 12 <= model.slots.slots and len(model.slots.held) == 12


def test_a_longer_prefix_and_a_wider_head_find_room(
    tiny_bert: BertModel, batch: Batch, learned: Any, assert_as_by_itself: Any
) -> None:
    model = learned(tiny_bert, 2)
    names = ["task-0", "task-1"] * 2
    assert_as_by_itself(model, batch, names)
    long = model.adapters["task-1"]
    wide = {"label_names": tuple("abcdefg"), "head_weight": torch.randn(7, 32), "head_bias": torch.randn(7)}
    heads = tuple(torch.rand(4) for _ in long.alphas)
    model.add_task(
        replace(
            long,
            name="long",
            keys=tuple(torch.cat([key, key], dim=1) for key in long.keys),
            values=tuple(torch.cat([value, -value], dim=1) for value in long.values),
            alphas=heads,
            taus=heads,
            **wide,
        )
    )
    assert_as_by_itself(model, batch, ["long", "task-0", "task-1", "long"])
    assert_as_by_itself(model, batch, names)
    assert logits(model, batch, names).shape == (4, 3)


def test_gates_in_one_batch(tiny_bert: BertModel, batch: Batch, learned: Any, assert_as_by_itself: Any) -> None:
    model = learned(tiny_bert, 2)
    plain = replace(model.adapters["task-0"], name="plain", gate=None, alphas=(), taus=())
    model.add_task(plain)
    model.add_task(replace(model.adapters["task-1"], name="other", gate="gelu"))
    assert_as_by_itself(model, batch, ["plain", "task-0", "task-1", "plain"])
    assert_as_by_itself(model, batch, ["plain", "other"] * 2)
    assert_as_by_itself(model, batch, ["plain"] * 4)
    with pytest.raises(ValueError, match=r"gelu.*tanh"):
        logits(model, batch, ["task-0", "other"] * 2)


def test_a_task_without_a_head_gives_features_alone(tiny_bert: BertModel, batch: Batch, learned: Any) -> None:
    model = learned(tiny_bert, 2)
    bare = replace(model.adapters["task-1"], name="bare", label_names=(), head_weight=None, head_bias=None)
    model.add_task(bare)
    names = ["task-0", "bare"] * 2
    with pytest.raises(RuntimeError, match="'bare' has no head"):
        logits(model, batch, names)
    with model.using(names, 4):
        found = model.encode(batch)
    torch.testing.assert_close(found[1], model.features(batch, task="task-1")[1])


def test_positions_are_those_of_the_samples_tasks(learned: Any, assert_as_by_itself: Any) -> None:
    """A task that is in a slot, but not in the batch, takes no positions."""
    base = BertModel(BertConfig(**SIZES, max_position_embeddings=14)).eval()
    model = learned(base, 2)
    batch = {"input_ids": torch.arange(5, 15).expand(4, 10), "attention_mask": torch.ones(4, 10, dtype=torch.long)}
    for shift in (3, 4, 9):
        model.add_task(replace(model.adapters["task-1"], name=f"shifted-{shift}", position_shift=shift))
    assert_as_by_itself(model, batch, ["shifted-3", "task-0", "shifted-4", "task-1"])
    with pytest.raises(ValueError, match="takes 9 positions"):
        logits(model, batch, ["shifted-3", "task-0", "shifted-9", "task-1"])
    assert "shifted-9" in model.slots.held
    assert_as_by_itself(model, batch, ["shifted-3", "task-0", "shifted-4", "task-1"])


def test_a_moved_model_makes_its_slots_anew(
    tiny_bert: BertModel, batch: Batch, learned: Any, assert_as_by_itself: Any
) -> None:
    model = learned(tiny_bert, 2)
    names = ["task-0", "task-1"] * 2
    single = logits(model, batch, names)
    model.double()
    assert model.slots.bytes == 0
    assert_as_by_itself(model, batch, names, atol=1e-5, rtol=1e-5)
    assert model.slots._slots["keys.0"].dtype == torch.float64
    model.base_model.float()  # behind its back
    torch.testing.assert_close(logits(model, batch, names), single)
    model.to(torch.bfloat16)
    assert_as_by_itself(model, batch, names, atol=0.05, rtol=0.05)
    assert model.slots._slots["keys.0"].dtype == torch.bfloat16


def test_slots_outlive_inference_mode(
    tiny_bert: BertModel, batch: Batch, learned: Any, assert_as_by_itself: Any
) -> None:
    model = learned(tiny_bert, 3)
    with torch.inference_mode():
        model(**batch, task_names=["task-0"] * 4)
    embedded = {"inputs_embeds": tiny_bert.embeddings.word_embeddings(batch["input_ids"]).detach().requires_grad_()}
    output = model(**embedded, attention_mask=batch["attention_mask"], task_names=["task-0", "task-1"] * 2)
    output.logits[:, :2].sum().backward()
    assert embedded["inputs_embeds"].grad.abs().sum() > 0
    with torch.inference_mode():
        model(**batch, task_names=["task-2", "task-1"] * 2)
    assert_as_by_itself(model, batch, ["task-2", "task-0", "task-1", "task-0"])
