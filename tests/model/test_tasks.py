"""Finished tasks: they come, go and are read from other models' folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE

Batch = dict[str, Tensor]


def logits(model: QTuningModel, batch: Batch, names: list[str]) -> Tensor:
    with torch.no_grad():
        return model(**batch, task_names=names).logits


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_tasks_come_and_go_while_it_serves(
    tiny_bert: BertModel, batch: Batch, placement: str, learned: Any, assert_as_by_itself: Any
) -> None:
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
    model.adapters.remove("task-1")  # behind the model's back, and the slots know
    again = replace(model.adapters["task-0"], name="task-1")
    model.adapters.add(again.info, value=again)
    assert_as_by_itself(model, batch, names)


def test_what_cannot_be_removed(tiny_bert: BertModel, batch: Batch, learned: Any) -> None:
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


def test_all_tasks_may_go_where_nothing_is_retained(tiny_bert: BertModel, tmp_path: Path, learned: Any) -> None:
    model = learned(tiny_bert, 2, retention_weight=0.0)
    for name in model.tasks:
        model.remove_task(name)
    model.save_pretrained(tmp_path)
    model = QTuningModel.from_pretrained(model.detach(), tmp_path)
    model.start_task("next", 2)
    assert model.finish_task().prefix_rows == 1 + 3 * 2  # the queue has kept the prompts


def test_a_task_of_another_saved_model(
    tiny_bert: BertModel, batch: Batch, tmp_path: Path, learned: Any, each_by_itself: Any
) -> None:
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
    assert model.adapters.entry("task-2").value is None  # it has a file
    assert torch.equal(logits(model, batch, ["task-2"] * 4), mixed)


@pytest.mark.parametrize("changes", [{"layers": [1, 2]}, {"placement": "input"}])
def test_a_task_whose_prefix_stands_elsewhere_is_refused(
    tiny_bert: BertModel, tmp_path: Path, changes: dict, learned: Any
) -> None:
    theirs = learned(tiny_bert, 1, layers=[0, 1])
    theirs.save_pretrained(tmp_path)
    model = learned(theirs.detach(), 0, **changes)
    with pytest.raises(ValueError, match=r"the prefixes in .* have placement='prefix'.*layers="):
        model.load_task(tmp_path, "task-0")


def test_a_task_for_another_base_model_is_refused(tiny_bert: BertModel, tmp_path: Path, learned: Any) -> None:
    theirs = learned(tiny_bert, 1)
    theirs.save_pretrained(tmp_path)
    base = theirs.detach()
    with torch.no_grad():
        base.get_submodule("encoder.layer.1.output.dense").weight.mul_(1.01)
    with pytest.raises(ValueError, match="another base model"):
        learned(base, 0).load_task(tmp_path, "task-0")


@pytest.mark.parametrize(
    ("limits", "error"),
    [({"host_bytes": 0}, ValueError), ({"device_bytes": 1.5}, TypeError), ({"host_bytes": True}, TypeError)],
)
def test_limits_that_are_none(tiny_bert: BertModel, limits: dict, error: type[Exception], learned: Any) -> None:
    with pytest.raises(error, match=next(iter(limits))):
        learned(tiny_bert, 0).set_memory_limits(**limits)


def test_an_adapter_is_taken_into_the_hosts_memory_without_its_gradients(tiny_bert: BertModel, learned: Any) -> None:
    model = learned(tiny_bert, 1)
    given = replace(model.adapters["task-0"], name="new", head_bias=torch.zeros(2, requires_grad=True))
    model.add_task(given)
    assert not model.adapters["new"].tensors()["head.bias"].requires_grad and given.head_bias.requires_grad
    with pytest.raises(ValueError, match="task 'new' is finished already; call remove_task first"):
        model.add_task(given)


def test_labels_are_known_without_the_adapter(tiny_bert: BertModel, tmp_path: Path, learned: Any) -> None:
    saved = learned(tiny_bert, 2)
    saved.save_pretrained(tmp_path)
    model = QTuningModel.from_pretrained(saved.detach(), tmp_path, lazy=True)
    assert model.label_names("task-1") == ("0", "1", "2")
    assert model.adapters.entry("task-1").value is None  # not read yet
    with pytest.raises(ValueError, match="task 'x' is not among the finished tasks: task-0, task-1"):
        model.label_names("x")
    with pytest.raises(ValueError, match="among the finished tasks: none yet"):
        learned(model.detach(), 0).label_names("x")


def test_names_must_be_one_a_sample(tiny_bert: BertModel, learned: Any) -> None:
    model = learned(tiny_bert, 2)
    for names in ("task-0", ["task-0"], ["task-0"] * 3):
        with pytest.raises(ValueError, match="must hold one name for each of the 2 samples"), model.using(names, 2):
            pass


def test_bounds_on_memory_reach_the_slots_and_the_registry(tiny_bert: BertModel, batch: Batch, learned: Any) -> None:
    model = learned(tiny_bert, 2)
    logits(model, batch, ["task-0", "task-1"] * 2)
    assert model.slots.bytes > 0
    model.set_memory_limits(device_bytes=10**6, host_bytes=10**5)
    assert (model.slots.device_bytes, model.adapters.host_bytes, model.slots.bytes) == (10**6, 10**5, 0)
    model.set_memory_limits()
    assert (model.slots.device_bytes, model.adapters.host_bytes) == (None, None)


def test_a_task_says_what_its_labels_mean(tiny_bert: BertModel) -> None:
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=2))
    for name, problem_type, outputs in (("topics", MULTI, 3), ("stars", REGRESSION, None), ("moods", SINGLE, 2)):
        model.start_task(name, outputs, problem_type=problem_type)
        model.finish_task()
    assert [model.problem_type(name) for name in model.tasks] == [MULTI, REGRESSION, SINGLE]
    assert model.label_names("stars") == ("0",)
    with pytest.raises(ValueError, match="'others' is not among"):
        model.problem_type("others")


def test_an_added_adapter_keeps_its_problem_type(tiny_bert: BertModel, learned: Any) -> None:
    model = learned(tiny_bert, 2)
    first = model.adapters["task-0"]
    model.add_task(replace(first, name="several", problem_type=MULTI))
    assert model.problem_type("several") == MULTI
    with pytest.raises(ValueError, match="problem_type is 'ranking'"):
        model.add_task(replace(first, name="other", problem_type="ranking"))
    one = {"label_names": ("stars",), "head_weight": first.head_weight[:1], "head_bias": first.head_bias[:1]}
    model.add_task(replace(first, name="stars", problem_type=REGRESSION, **one))
    with pytest.raises(ValueError, match="needs two"):
        model.add_task(replace(first, name="one class", **one))
