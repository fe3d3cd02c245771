"""Statistics of a model's tasks, and the rule that chooses: recorded, changed, copied, under a bound on memory."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from qtuning_fast import QTuningModel
from qtuning_fast.method.labels import MULTI, REGRESSION
from qtuning_fast.method.statistics import Recorder, TaskStatistics
from qtuning_fast.method.task_rule import TaskRule
from qtuning_fast.method.task_rules import RanPAC

Batch = dict[str, Tensor]


def tensors(model: QTuningModel, name: str) -> dict[str, Tensor]:
    return model.statistics[name].tensors()


def same(one: TaskStatistics, other: TaskStatistics) -> bool:
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


# Recording


def test_what_is_recorded_are_moments_of_the_base_models_features(kind: Any, recognising: Any, inputs_of: Any) -> None:
    model = recognising(kind, 2)
    batches = [inputs_of(kind, 1, 7, seed) for seed in (3, 4)]
    labels = [torch.tensor([0, 1, 2, -100, 1, 0, 1]), torch.tensor([[2], [2], [-100], [1], [0], [0], [1]])]
    held = inputs_of(kind, 1, 5, 5) | {"labels": torch.tensor([0, -100, 2, 1, 1])}
    model.set_task("task-0")
    model.record_statistics("task-1", (b | {"labels": y} for b, y in zip(batches, labels)), validation=[held])
    assert model.active_task == "task-0"
    found = model.statistics["task-1"]
    x = torch.cat([model.features(batch, task=None) for batch in batches]).double().numpy()
    y = torch.cat([each.flatten() for each in labels]).numpy()
    if not model.has_heads:  # free text: one class, and labels do not matter
        y[:] = 0
    x, y, classes = x[y >= 0], y[y >= 0], 3 if model.has_heads else 1
    means = np.stack([x[y == c].mean(0) for c in range(classes)])
    assert found.features.counts.tolist() == np.bincount(y).tolist()
    np.testing.assert_allclose(found.features.means, means, atol=1e-6)
    np.testing.assert_allclose(found.features.scatter, (x - means[y]).T @ (x - means[y]), atol=1e-4)
    counted = torch.ones(5, dtype=torch.bool) if not model.has_heads else held.pop("labels") >= 0
    torch.testing.assert_close(found.validation_features, model.features(held, task=None)[counted], atol=1e-6, rtol=0)


def test_what_was_recorded_before_is_replaced(families: Any, recognising: Any, inputs_of: Any) -> None:
    model = recognising(families["BERT"], 2)
    before = [model.infer_tasks(**inputs_of(families["BERT"], task)).task_probabilities for task in (0, 1)]
    batch = BatchEncoding(inputs_of(families["BERT"], 2, 9) | {"labels": torch.arange(9) % 2})
    model.record_statistics("task-0", [batch])
    assert model.statistics["task-0"].features.counts.tolist() == [5, 4]
    assert model.infer_tasks(**inputs_of(families["BERT"], 2)).task_names == ["task-0"] * 6
    assert not torch.equal(model.infer_tasks(**inputs_of(families["BERT"], 0)).task_probabilities, before[0])


@pytest.mark.parametrize("problem_type", [MULTI, REGRESSION])
def test_answers_that_are_not_one_class_of_several_are_one_class(
    problem_type: str, families: Any, recognising: Any, inputs_of: Any
) -> None:
    family = families["BERT"]
    model = recognising(family, 2)
    model.start_task("other", 3, problem_type=problem_type)
    model.finish_task()
    labels = torch.full((24, 3), 0.5)
    for batch in (inputs_of(family, 2, 24), inputs_of(family, 2, 24) | {"labels": labels}):
        model.record_statistics("other", [batch])
        assert model.statistics["other"].features.counts.tolist() == [24]
    found = model.infer_tasks(**inputs_of(family, 2, 24))
    assert found.classes == (2, 3, 1) and found.task_names.count("other") >= 22


def test_a_task_that_writes_the_names_of_classes_has_these_classes(
    families: Any, recognising: Any, inputs_of: Any
) -> None:
    family = families["T5"]
    model = recognising(family, 1)
    model.start_task("moods", label_names=["good", "bad"])
    model.finish_task()
    model.record_statistics("moods", [inputs_of(family, 1, 24) | {"labels": torch.arange(24) % 3 % 2}])
    assert model.statistics["moods"].features.counts.tolist() == [16, 8]
    found = model.infer_tasks(**inputs_of(family, 1, 24))
    assert found.classes == (1, 2) and found.task_names.count("moods") >= 22


@pytest.mark.parametrize(
    ("batches", "error", "named"),
    [
        ([], ValueError, "no examples to record"),
        ([{"labels": torch.full((6,), -100)}], ValueError, "no examples to record"),
        (["input_ids"], TypeError, "a batch is a str; it must map names of inputs"),
        ([{}], TypeError, r"labels is missing, but task 'task-1' has 3 classes.*\[6\] class indices"),
        ([{"labels": [0, 1, 2, 0, 1, 2]}], TypeError, "labels is a list, but task 'task-1' has 3 classes"),
        ([{"labels": torch.zeros(6)}], ValueError, r"labels is torch.float32 of shape \[6\], but task 'task-1'"),
        ([{"labels": torch.zeros(6, 3).long()}], ValueError, r"labels is torch.int64 of shape \[6, 3\]"),
        ([{"labels": torch.full((6,), 3)}], ValueError, "labels holds 3; the task has 3 classes, so it must be 0 to 2"),
        ([{"labels": torch.full((6,), -1)}], ValueError, "labels holds -1"),
    ],
)
def test_examples_that_are_none_leave_all_as_it_was(
    batches: list[Any], error: type[Exception], named: str, families: Any, recognising: Any, inputs_of: Any
) -> None:
    family = families["BERT"]
    model = recognising(family, 2)
    before = copy.deepcopy(model.statistics["task-1"])
    full = [batch if isinstance(batch, str) else inputs_of(family, 1) | batch for batch in batches]
    right = inputs_of(family, 1) | {"labels": torch.zeros(6, dtype=torch.long)}
    with pytest.raises(error, match=named):
        model.record_statistics("task-1", full)
    if batches and "no examples" not in named:
        with pytest.raises(error, match=named):
            model.record_statistics("task-1", [right], validation=full)
    assert same(model.statistics["task-1"], before)
    with pytest.raises(ValueError, match="'task-7' is not among the finished tasks"):
        model.record_statistics("task-7", [right])


def test_a_task_that_goes_while_it_is_recorded_leaves_nothing_behind(
    families: Any, recognising: Any, inputs_of: Any
) -> None:
    model, family = recognising(families["BERT"], 3), families["BERT"]
    adapter = model.adapters["task-0"]

    def batches(*, again: bool) -> Iterator[Batch]:
        yield inputs_of(family, 0) | {"labels": torch.zeros(6, dtype=torch.long)}
        model.remove_task("task-0")
        if again:
            model.add_task(replace(adapter))  # another one of this name

    for again in (True, False):
        with pytest.raises(ValueError, match="'task-0' was removed while its statistics were recorded"):
            model.record_statistics("task-0", batches(again=again))
        assert "task-0" not in model.statistics


# The choice


def test_tasks_without_statistics_are_left_out_by_name(families: Any, recognising: Any, learned: Any) -> None:
    model, batch = recognising(families["BERT"], 3), families["BERT"].batch()
    bare = learned(families["BERT"].base_model(1), 2)
    with pytest.raises(
        ValueError, match=r"'closed-form' needs statistics, which task-0, task-1 lack; call record_stat"
    ):
        bare.infer_tasks(**batch)
    with pytest.raises(ValueError, match="no finished tasks yet"):
        learned(families["BERT"].base_model(1), 0).infer_tasks(**batch)
    adapter = model.adapters["task-1"]
    model.remove_task("task-1")
    model.add_task(adapter)
    found = model.infer_tasks(**batch)
    assert found.tasks == ("task-0", "task-2") and found.left_out == ("task-1",)
    assert model(**batch, task_names="infer").task_index.tolist() == [
        model.tasks.index(name) for name in found.task_names
    ]


def test_a_task_that_came_and_went_leaves_no_trace(families: Any, recognising: Any, inputs_of: Any) -> None:
    family = families["BERT"]
    model, batch = recognising(family, 2), inputs_of(family, 0, seed=3)
    before = model.infer_tasks(**batch)
    kept = {name: (model.adapters[name], model.statistics[name]) for name in model.tasks}
    model.start_task("a new one", 2)  # first by name
    model.finish_task()
    model.set_task(None)
    model.record_statistics("a new one", [inputs_of(family, 1) | {"labels": torch.arange(6) % 2}])
    assert not torch.equal(model.infer_tasks(**batch).classes_of("task-0"), before.classes_of("task-0"))
    model.remove_task("a new one")
    after = model.infer_tasks(**batch)
    assert torch.equal(after.class_probabilities, before.class_probabilities) and after.threshold == before.threshold
    for name in model.tasks:
        model.remove_task(name)
    for name in reversed(kept):  # learned in another order
        model.add_task(*kept[name])
    after = model.infer_tasks(**batch)
    assert after.tasks == ("task-1", "task-0") and after.task_names == before.task_names
    for name in kept:
        assert torch.equal(after.classes_of(name), before.classes_of(name))


class Largest(TaskRule):
    """A rule of a user's own: the class whose mean has the largest product with the features."""

    name = "largest"
    fits = 0

    def fit(self, candidates: Any) -> Any:
        self.fits += 1
        means = torch.cat([each.known.features.means for each in candidates])
        return lambda evidence: evidence.features @ means.T


def test_a_rule_of_a_users_own_is_fitted_when_something_changes(
    families: Any, recognising: Any, inputs_of: Any
) -> None:
    family = families["BERT"]
    model, batch = recognising(family, 3), inputs_of(family, 1, seed=3)
    model.task_rule = rule = Largest()
    for _ in range(3):
        found = model.infer_tasks(**batch)
    assert rule.fits == 1 and model.task_rule is rule
    means = torch.cat([each.features.means for each in model.statistics.values()])
    best = (model.features(batch, task=None).double() @ means.T).argmax(1)
    assert found.class_probabilities.argmax(1).tolist() == best.tolist()
    changes = [
        lambda: model.remove_task("task-0"),
        lambda: model.record_statistics("task-1", [batch | {"labels": torch.arange(6) % 3}]),
        lambda: model.adapters.remove("task-2"),
    ]
    for number, change in enumerate(changes):
        change()
        model.infer_tasks(**batch)
        assert rule.fits == 2 + number
    model.task_rule = "nearest-mean"
    model.infer_tasks(**batch)
    assert rule.fits == 4 and model.task_rule.name == "nearest-mean"


def test_rules_that_are_none_are_refused_and_the_one_before_stays(families: Any, recognising: Any) -> None:
    model = recognising(families["BERT"], 1)
    for wrong, error in (("nearest", ValueError), (None, TypeError)):
        with pytest.raises(error, match="it must be"):
            model.task_rule = wrong
    assert model.task_rule.name == "closed-form"


def test_ranpac_takes_what_was_recorded_under_it(families: Any, recognising: Any, inputs_of: Any) -> None:
    family = families["BERT"]
    model = recognising(family, 2)
    model.task_rule = RanPAC(size=40)
    with pytest.raises(ValueError, match="'ranpac' needs statistics, which task-0, task-1 lack"):
        model.infer_tasks(**inputs_of(family, 0))
    for task in (0, 1):
        batch = inputs_of(family, task, 24) | {"labels": torch.arange(24) % (2 + task)}
        model.record_statistics(f"task-{task}", [batch], validation=[batch])
        assert model.infer_tasks(**inputs_of(family, 0)).left_out == (("task-1",) if task == 0 else ())
    for rule in (model.task_rule, "closed-form"):  # the features themselves were recorded too
        model.task_rule = rule
        for task in (0, 1):
            assert model.infer_tasks(**inputs_of(family, task, 24)).task_names.count(f"task-{task}") >= 22


def test_the_most_confident_adapter_needs_no_statistics(families: Any, learned: Any, logits: Any) -> None:
    family = families["BERT"]
    model, batch = learned(family.base_model(), 3), family.batch()
    model.task_rule = "most-confident"
    found = model.infer_tasks(**batch)
    each = torch.stack([logits(model, batch, name).double().softmax(1).amax(1) for name in model.tasks], dim=1)
    torch.testing.assert_close(found.task_probabilities, each / each.sum(1, keepdim=True), atol=1e-6, rtol=0)
    assert found.distances is None and found.is_known.all() and found.left_out == ()


def test_confidences_are_compared_only_where_there_are_some(families: Any, recognising: Any) -> None:
    model = recognising(families["T5"], 2)
    model.task_rule = "most-confident"
    with pytest.raises(ValueError, match="'most-confident' compares heads, but task_type='text-to-text' has none"):
        model.infer_tasks(**families["T5"].batch())
    model = recognising(families["BERT"], 1)
    model.start_task("height", 1, problem_type=REGRESSION)
    model.finish_task()
    model.task_rule = "most-confident"
    with pytest.raises(ValueError, match="but task 'height' has problem_type='regression'; choose another rule"):
        model.infer_tasks(**families["BERT"].batch())


# Statistics made elsewhere, copies, memory


def test_statistics_that_do_not_fit_are_refused_with_their_task(families: Any, recognising: Any) -> None:
    model = recognising(families["BERT"], 2)
    statistics, adapter = model.statistics["task-0"], replace(model.adapters["task-0"], name="new")
    few = Recorder(2)
    few.add(torch.zeros(1, 5), torch.zeros(1).long())
    for wrong, error, named in (
        (
            model.statistics["task-1"],
            ValueError,
            "3 classes and 32 features, but task 'new' has 2 and the base model 32",
        ),
        (few.finish(), ValueError, "2 classes and 5 features, but task 'new' has 2 and the base model 32"),
        (statistics.tensors(), TypeError, "statistics is a dict; it must be a TaskStatistics"),
    ):
        with pytest.raises(error, match=named):
            model.add_task(adapter, wrong)
        assert "new" not in model.tasks and "new" not in model.statistics
    model.add_task(adapter, statistics)
    assert same(model.statistics["new"], statistics)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_recognises_the_same_and_is_a_model_of_its_own(
    copied: Any, families: Any, recognising: Any, inputs_of: Any
) -> None:
    family = families["BERT"]
    model, batch = recognising(family, 3), inputs_of(family, 1, seed=3)
    expected = model.infer_tasks(**batch).class_probabilities
    model.task_rule = "most-confident"
    model.infer_tasks(**batch)  # now there is a fitted choice, of a function that cannot be pickled
    other = copied(model)
    assert other.task_rule.name == "most-confident" and other.task_rule is not model.task_rule
    model.task_rule = other.task_rule = "closed-form"
    assert torch.equal(other.infer_tasks(**batch).class_probabilities, expected)
    other.remove_task("task-1")
    assert "task-1" not in other.statistics and "task-1" not in other.infer_tasks(**batch).task_names
    assert torch.equal(model.infer_tasks(**batch).class_probabilities, expected)


def test_under_a_bound_statistics_are_read_when_tasks_change(
    tmp_path: Path, families: Any, recognising: Any, inputs_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families["BERT"]
    model, batch = recognising(family, 3), inputs_of(family, 1, seed=3)
    expected = model.infer_tasks(**batch).class_probabilities
    model.set_memory_limits(host_bytes=10**9)  # it bounds adapters
    unsaved = model.statistics.bytes_in_memory
    assert unsaved == sum(entry.info.bytes for entry in model.statistics.entries()) > 0  # they have no file yet
    model.save_pretrained(tmp_path)
    assert model.statistics.bytes_in_memory == 0
    model.remove_task("task-2")
    model.load_task(tmp_path, "task-2")
    read: list[str] = []
    get = type(model.statistics).__getitem__
    monkeypatch.setattr(
        type(model.statistics), "__getitem__", lambda self, name: (read.append(name), get(self, name))[1]
    )
    for _ in range(2):
        assert torch.equal(model.infer_tasks(**batch).class_probabilities, expected)
    assert sorted(read) == model.tasks and model.statistics.bytes_in_memory == 0
    model.set_memory_limits(host_bytes=None)
    model.statistics["task-0"]
    assert model.statistics.bytes_in_memory > 0


@pytest.mark.parametrize("name", ["infer", "validation", "random"])
def test_reserved_names(name: str, families: Any, recognising: Any) -> None:
    for family in (families["BERT"], families["T5"]):
        model = recognising(family, 1)
        adapter = replace(model.adapters["task-0"], name=name)
        for refused in (lambda: model.start_task(name, 2), lambda: model.add_task(adapter)):  # noqa: B023
            with pytest.raises(
                ValueError, match=f"name is '{name}', which is no task name: 'infer', 'validation', 'ran"
            ):
                refused()
        assert model.tasks == ["task-0"] and model.learning.task is None


# Several processes


def test_two_processes_that_record_their_shares_come_to_what_one_comes_to(tmp_path: Path) -> None:
    """Over gloo; in the second run one of them has a label that is wrong."""
    script = str(Path(__file__).with_name("statistics_run.py"))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    processes = [
        subprocess.Popen([sys.executable, script, str(tmp_path), rank], env=environment, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["together"] == second["together"] and first["alone"] == second["alone"]
    for name, value in first["alone"].items():
        np.testing.assert_allclose(first["together"][name], value, atol=1e-10, err_msg=name)
    assert first["error"] == second["error"] == "labels holds 7; the task has 3 classes, so it must be 0 to 2"
