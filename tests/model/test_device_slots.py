"""Batches of several tasks: they compute what each task computes by itself, whatever went through the slots before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.method.adapter import TaskAdapter
from qtuning_fast.model.device_slots import AdapterSlots

Batch = dict[str, Tensor]
SMALL = {"prompt_length": 2, "queue_size": 3, "shared_length": 1, "reparameterization": None}


SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def learned(base: Any, tasks: int, seed: int = 1, **changes: Any) -> QTuningModel:
    """A model with finished tasks, every parameter somewhere at random; the prefixes of the first ones are shorter."""
    torch.manual_seed(seed)
    model = QTuningModel(base, QTuningConfig(**(SMALL | changes)))
    for number in range(tasks):
        model.start_task(f"task-{number}", 2 + number % 3)
        with torch.no_grad():
            for parameter in [*model.training_prefix.parameters(), *model.head.parameters()]:
                parameter.add_(torch.randn_like(parameter) * 0.5)
        model.finish_task()
    model.set_task(None)
    return model


def logits(model: QTuningModel, batch: Batch, names: list[str] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**batch, task_names=names).logits


def each_by_itself(model: QTuningModel, batch: Batch, names: list[str]) -> list[Tensor]:
    found = []
    for row, name in enumerate(names):
        model.set_task(name)
        found.append(logits(model, batch)[row])
    model.set_task(None)
    return found


def assert_as_by_itself(model: QTuningModel, batch: Batch, names: list[str], **tolerance: float) -> None:
    mixed = logits(model, batch, names)
    for row, expected in enumerate(each_by_itself(model, batch, names)):
        assert mixed[row, len(expected) :].isneginf().all()
        torch.testing.assert_close(mixed[row, : len(expected)], expected, **tolerance)


def test_nothing_is_stacked_or_read_a_second_time(
    tiny_bert: BertModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
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


def test_the_least_recently_used_slot_goes_first(tiny_bert: BertModel, batch: Batch) -> None:
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


def test_slots_grow_with_what_is_used(tiny_bert: BertModel, batch: Batch) -> None:
    model = learned(tiny_bert, 12)
    logits(model, batch, ["task-0"] * 4)
    few = model.slots.slots
    for first in range(0, 12, 4):
        assert_as_by_itself(model, batch, [f"task-{number}" for number in range(first, first + 4)])
    assert few < 12 <= model.slots.slots and len(model.slots.held) == 12


def test_a_longer_prefix_and_a_wider_head_find_room(tiny_bert: BertModel, batch: Batch) -> None:
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


def test_gates_in_one_batch(tiny_bert: BertModel, batch: Batch) -> None:
    model = learned(tiny_bert, 2)
    plain = replace(model.adapters["task-0"], name="plain", gate=None, alphas=(), taus=())
    model.add_task(plain)
    model.add_task(replace(model.adapters["task-1"], name="other", gate="gelu"))
    assert_as_by_itself(model, batch, ["plain", "task-0", "task-1", "plain"])
    assert_as_by_itself(model, batch, ["plain", "other"] * 2)
    assert_as_by_itself(model, batch, ["plain"] * 4)
    with pytest.raises(ValueError, match=r"gelu.*tanh"):
        logits(model, batch, ["task-0", "other"] * 2)


def test_a_task_without_a_head_gives_features_alone(tiny_bert: BertModel, batch: Batch) -> None:
    model = learned(tiny_bert, 2)
    bare = replace(model.adapters["task-1"], name="bare", label_names=(), head_weight=None, head_bias=None)
    model.add_task(bare)
    names = ["task-0", "bare"] * 2
    with pytest.raises(RuntimeError, match="'bare' has no head"):
        logits(model, batch, names)
    with model.using(names, 4):
        found = model.encode(batch)
    torch.testing.assert_close(found[1], model.features(batch, task="task-1")[1])


def test_positions_are_those_of_the_samples_tasks() -> None:
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


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_tasks_come_and_go_while_it_serves(tiny_bert: BertModel, batch: Batch, placement: str) -> None:
    model = learned(tiny_bert, 4, placement=placement)
    names = ["task-0", "task-1", "task-2", "task-1"]
    before = logits(model, batch, names)
    other = replace(model.adapters["task-2"], name="task-1")
    free = model.slots.slots - len(model.slots.held)
    model.remove_task("task-1")
    assert model.tasks == ["task-0", "task-2", "task-3"] and "task-1" not in model.slots.held
    assert model.slots.slots - len(model.slots.held) == free + 1
    with pytest.raises(ValueError, match="'task-1' is not among"):
        logits(model, batch, names)
    model.add_task(other)
    assert_as_by_itself(model, batch, names)
    after = logits(model, batch, names)
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.equal(after[1], before[1])
    model.adapters.remove("task-1")  # behind the model's back, and the bank knows
    again = replace(model.adapters["task-0"], name="task-1")
    model.adapters.add(again.info, adapter=again)
    assert_as_by_itself(model, batch, names)


def test_what_cannot_be_removed(tiny_bert: BertModel, batch: Batch) -> None:
    model = learned(tiny_bert, 3)
    model.set_task("task-0")
    with pytest.raises(RuntimeError, match="'task-0' is set"):
        model.remove_task("task-0")
    with pytest.raises(RuntimeError, match=r"'task-2' was learned last.*retention"):
        model.remove_task("task-2")
    with pytest.raises(ValueError, match="'x' is not among"):
        model.remove_task("x")
    model.start_task("new", 2)
    with pytest.raises(RuntimeError, match="'new' is in training"):
        model.remove_task("new")
    with pytest.raises(ValueError, match="'new' is in training"):
        model.add_task(replace(model.adapters["task-0"], name="new"))
    assert model.tasks == ["task-0", "task-1", "task-2"]


def test_learning_goes_on_whatever_came_and_went(tiny_bert: BertModel, batch: Batch, tmp_path: Path) -> None:
    """Queue, shared prompt and retention go by what was learned here, not by what is in the store."""
    labels, found = torch.tensor([0, 1, 1, 0]), []
    for changed in (False, True):
        model = learned(tiny_bert, 4)
        if changed:
            model.remove_task("task-0")
            model.add_task(replace(model.adapters["task-1"], name="from elsewhere"))
            model.save_pretrained(tmp_path)
            model = QTuningModel.from_pretrained(model.detach(), tmp_path)
        torch.manual_seed(0)
        model.start_task("next", 2)
        model.train()
        output = model(**batch, labels=labels)
        assert output.retention_loss is not None
        found.append(output.loss)
        model.detach()
    assert torch.equal(*found)


def test_all_tasks_may_go_where_nothing_is_retained(tiny_bert: BertModel, tmp_path: Path) -> None:
    model = learned(tiny_bert, 2, retention_weight=0.0)
    for name in model.tasks:
        model.remove_task(name)
    model.save_pretrained(tmp_path)
    model = QTuningModel.from_pretrained(model.detach(), tmp_path)
    model.start_task("next", 2)
    assert model.finish_task().prefix_rows == 1 + 3 * 2  # the queue has kept the prompts


def test_a_task_of_another_saved_model(tiny_bert: BertModel, batch: Batch, tmp_path: Path) -> None:
    theirs = learned(tiny_bert, 3, seed=7, gate_per="head", gate="gelu")
    expected = each_by_itself(theirs, batch, ["task-2"] * 4)
    theirs.save_pretrained(tmp_path)
    model = learned(theirs.detach(), 2)
    model.load_task(tmp_path, "task-2")
    assert model.tasks == ["task-0", "task-1", "task-2"]
    mixed = logits(model, batch, ["task-2"] * 4)
    torch.testing.assert_close(list(mixed), expected)
    with pytest.raises(ValueError, match="'task-2' is finished already"):
        model.load_task(tmp_path, "task-2")
    with pytest.raises(ValueError, match=r"'x' is not among those in .*task-0"):
        model.load_task(tmp_path, "x")
    model.set_memory_limits(host_bytes=1)
    assert model.adapters.entry("task-2").adapter is None  # it has a file
    assert torch.equal(logits(model, batch, ["task-2"] * 4), mixed)


@pytest.mark.parametrize("changes", [{"layers": [1, 2]}, {"placement": "input"}])
def test_a_task_whose_prefix_stands_elsewhere_is_refused(tiny_bert: BertModel, tmp_path: Path, changes: dict) -> None:
    theirs = learned(tiny_bert, 1, layers=[0, 1])
    theirs.save_pretrained(tmp_path)
    model = learned(theirs.detach(), 0, **changes)
    with pytest.raises(ValueError, match=r"the prefixes in .* have placement='prefix'.*layers="):
        model.load_task(tmp_path, "task-0")


def test_a_task_for_another_base_model_is_refused(tiny_bert: BertModel, tmp_path: Path) -> None:
    theirs = learned(tiny_bert, 1)
    theirs.save_pretrained(tmp_path)
    base = theirs.detach()
    with torch.no_grad():
        base.get_submodule("encoder.layer.1.output.dense").weight.mul_(1.01)
    with pytest.raises(ValueError, match="another base model"):
        learned(base, 0).load_task(tmp_path, "task-0")


def unfit(adapter: TaskAdapter) -> dict[str, Any]:
    short = tuple(key[..., :1] for key in adapter.keys)
    return {
        "keys.0 is": replace(adapter, keys=short),
        "values.2 is left out": replace(adapter, values=adapter.values[:2]),
        "keys.3 is": replace(adapter, keys=(*adapter.keys, adapter.keys[0])),
        "alphas.0 is": replace(adapter, alphas=tuple(torch.ones(3) for _ in adapter.alphas)),
        r"alphas.0 is \[\]; it must be left out": replace(adapter, gate=None, alphas=adapter.alphas[:2], taus=()),
        "head.weight is": replace(adapter, head_weight=torch.zeros(2, 5)),
        "head.bias is left out": replace(adapter, head_bias=None),
        "embeddings is": replace(adapter, embeddings=torch.zeros(3, 32)),
        "gate 'swish'": replace(adapter, gate="swish"),
        "labels": replace(adapter, label_names=("a",)),
        "name is empty": replace(adapter, name=""),
        "it must be a TaskAdapter": {"name": "dict"},
    }


def test_adapters_that_do_not_fit_are_refused(tiny_bert: BertModel) -> None:
    model = learned(tiny_bert, 1)
    adapter = replace(model.adapters["task-0"], name="new")
    for named, wrong in unfit(adapter).items():
        with pytest.raises((TypeError, ValueError), match=named):
            model.add_task(wrong)
    assert model.tasks == ["task-0"]
    model.add_task(adapter)


def test_a_moved_model_makes_its_slots_anew(tiny_bert: BertModel, batch: Batch) -> None:
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


def test_slots_outlive_inference_mode(tiny_bert: BertModel, batch: Batch) -> None:
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


def test_the_task_that_is_set_stands_as_before(tiny_bert: BertModel, batch: Batch) -> None:
    model = learned(tiny_bert, 2)
    model.set_task("task-1")
    expected, layer = logits(model, batch), model.backbone.injector.layers[0].module
    before = layer.qtuning_prefix["prefix_key"].data_ptr()
    logits(model, batch, ["task-0", "task-1"] * 2)
    assert layer.qtuning_prefix["prefix_key"].data_ptr() == before  # nothing was moved to the device again
    assert torch.equal(logits(model, batch), expected)
