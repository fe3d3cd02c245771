"""Probabilities of tasks: calibrated, the same in any order, right by Bayes' rule, and never NaN."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from torch import Tensor

from qtuning_fast.method import task_inference
from qtuning_fast.method.statistics import Recorder
from qtuning_fast.method.task_inference import FittedRule, TaskInference
from qtuning_fast.method.task_rule import Candidate, Evidence, LinearScores, TaskRule
from qtuning_fast.method.task_rules import ClosedForm, RanPAC, rule_by_name
from qtuning_fast.method.temperature import best_temperature

SIZES = {"birds": 3, "cars": 2, "apples": 1, "dogs": 4}
F = 6


def asked_for_nothing() -> Any:
    pytest.fail("adapters were asked")


def evidence(features: Tensor) -> Evidence:
    return Evidence(features, asked_for_nothing)


def drawn(task: str, n: int, seed: int, apart: float = 1.0) -> tuple[Tensor, Tensor]:
    """Examples of a task, whose class means do not depend on the seed."""
    classes, place = SIZES[task], sorted(SIZES).index(task)
    means = apart * torch.randn(classes, F, generator=torch.Generator().manual_seed(place))
    labels = torch.arange(n) % classes
    return means[labels] + torch.randn(n, F, generator=torch.Generator().manual_seed(100 * place + seed)), labels


def candidate(
    task: str, rule: TaskRule | None = None, *, n: int = 40, validation: int = 30, classes: int = 0
) -> Candidate:
    recorder = Recorder(classes or SIZES[task], {} if rule is None else {rule.feature_map: rule.map})
    recorder.add(*drawn(task, n, 1))
    return Candidate(task, recorder.classes, recorder.finish([drawn(task, validation, 2)] if validation else []))


def chosen(*tasks: str, rule: TaskRule | None = None, **changes: Any) -> FittedRule:
    rule = rule or ClosedForm()
    return FittedRule.fit(rule, [candidate(task, rule, **changes) for task in tasks])


INPUTS = torch.cat([drawn(task, 5, 3)[0] for task in SIZES]).double()


class Fixed(TaskRule):
    """Gives every input the same scores."""

    name = "fixed"

    def __init__(self, scores: Callable[[int], Tensor]) -> None:
        self.scores = scores

    def fit(self, candidates: Sequence[Candidate]) -> Callable[[Evidence], Tensor]:
        return lambda given: self.scores(len(given.features))


# Probabilities


@pytest.mark.parametrize("name", ["closed-form", "nearest-mean", "ranpac", "trained-head"])
def test_probabilities_are_the_softmax_of_scores_at_the_temperature(name: str) -> None:
    rule = RanPAC(size=30) if name == "ranpac" else rule_by_name(name)
    choice = chosen(*SIZES, rule=rule)
    found = choice.infer(evidence(INPUTS))
    by_name = sorted(SIZES)
    scores = choice.scores(evidence(INPUTS)).split([SIZES[task] for task in by_name], dim=1)
    expected = softmax(torch.cat([scores[by_name.index(task)] for task in SIZES], dim=1) / choice.temperature, axis=1)
    np.testing.assert_allclose(found.class_probabilities, expected, atol=1e-12)
    edges = np.cumsum([0, *SIZES.values()])
    of_tasks = np.stack([expected[:, a:b].sum(1) for a, b in pairwise(edges)], axis=1)
    np.testing.assert_allclose(found.task_probabilities, of_tasks, atol=1e-12)
    assert (found.task_probabilities.sum(1) - 1).abs().max() < 1e-12
    assert found.tasks == tuple(SIZES) and found.classes == tuple(SIZES.values()) and len(found) == len(INPUTS)
    assert found.task_names == [list(SIZES)[place] for place in of_tasks.argmax(1)]
    assert torch.equal(found.classes_of("cars"), found.class_probabilities[:, 3:5])


@pytest.mark.parametrize("name", ["closed-form", "nearest-mean", "ranpac", "trained-head"])
@settings(max_examples=8, deadline=None)
@given(order=st.permutations(list(SIZES)))
def test_any_order_of_tasks_gives_the_same_bit_for_bit(name: str, order: list[str]) -> None:
    rule = RanPAC(size=30) if name == "ranpac" else rule_by_name(name)
    first, second = (chosen(*tasks, rule=rule).infer(evidence(INPUTS)) for tasks in (SIZES, order))
    assert second.tasks == tuple(order) and first.task_names == second.task_names
    assert first.threshold == second.threshold and torch.equal(first.distances, second.distances)
    for task in SIZES:
        assert torch.equal(first.classes_of(task), second.classes_of(task))
        places = first.tasks.index(task), second.tasks.index(task)
        assert torch.equal(first.task_probabilities[:, places[0]], second.task_probabilities[:, places[1]])


def test_each_input_is_judged_alone() -> None:
    choice = chosen(*SIZES)
    whole = choice.infer(evidence(INPUTS))
    for row in range(len(INPUTS)):
        one = choice.infer(evidence(INPUTS[row : row + 1]))
        torch.testing.assert_close(one.class_probabilities[0], whole.class_probabilities[row], atol=1e-12, rtol=0)
        assert one.distances is not None and whole.distances is not None
        torch.testing.assert_close(one.distances[0], whole.distances[row], atol=1e-9, rtol=1e-12)


def test_the_most_probable_tasks_are_listed() -> None:
    found = chosen(*SIZES).infer(evidence(INPUTS))
    for tasks, row in zip(found.top(3), found.task_probabilities.tolist()):
        assert tasks == sorted(zip(SIZES, row), key=lambda each: -each[1])[:3]
    assert found.top(1) == [
        [(name, max(row))] for name, row in zip(found.task_names, found.task_probabilities.tolist())
    ]
    assert [len(each) for each in found.top(9)] == [4] * len(INPUTS)


@pytest.mark.parametrize("order", [("apples", "cars", "birds"), ("birds", "cars", "apples")])
def test_of_equals_the_first_by_name_is_taken_whatever_the_order(order: tuple[str, ...]) -> None:
    found = TaskInference(
        order, (1, 1, 1), torch.full((2, 3), 1 / 3), torch.full((2, 3), 1 / 3), None, math.inf, None, ()
    )
    assert found.task_names == ["apples"] * 2
    assert [name for name, _ in found.top(3)[0]] == ["apples", "birds", "cars"]
    assert found.is_known.tolist() == [True, True]


def test_one_task_of_one_class_is_certain() -> None:
    found = chosen("apples").infer(evidence(INPUTS))
    assert found.task_names == ["apples"] * len(INPUTS) and (found.class_probabilities == 1).all()


def test_classes_without_an_example_are_impossible() -> None:
    """Fewer examples than classes: only the first two classes of four have been seen."""
    choice = FittedRule.fit(ClosedForm(), [candidate("dogs", n=2), candidate("cars")])
    found = choice.infer(evidence(INPUTS))
    assert not found.classes_of("dogs")[:, 2:].any() and (found.task_probabilities.sum(1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_far_from_all_that_was_seen_probabilities_are_still_probabilities(scale: float) -> None:
    found = chosen(*SIZES).infer(evidence(scale * INPUTS))
    assert found.class_probabilities.isfinite().all() and (found.class_probabilities.sum(1) - 1).abs().max() < 1e-12
    assert found.distances is not None and (found.distances >= 0).all()


# Priors


def test_priors_act_by_bayes_rule_after_the_temperature() -> None:
    choice = chosen(*SIZES)
    assert abs(choice.temperature - 1) > 0.01  # so that before and after differ
    plain = choice.infer(evidence(INPUTS)).class_probabilities.numpy()
    priors = {"birds": 3.0, "cars": 0.5, "dogs": np.float32(1.0)}
    weights = np.repeat([priors.get(task, 0) / n for task, n in SIZES.items()], list(SIZES.values()))
    expected = plain * weights
    found = choice.infer(evidence(INPUTS), priors=priors)
    np.testing.assert_allclose(found.class_probabilities, expected / expected.sum(1, keepdims=True), atol=1e-12)
    assert not found.classes_of("apples").any()
    tenfold = choice.infer(evidence(INPUTS), priors={task: 10 * p for task, p in priors.items()})
    torch.testing.assert_close(tenfold.class_probabilities, found.class_probabilities)


def test_a_prior_is_shared_by_the_classes_that_have_an_example() -> None:
    """Two of four classes were seen; where the scores say nothing, the task has the whole of its prior."""
    flat = Fixed(lambda n: torch.tensor([[0.0, 0, 0, 0, -torch.inf, -torch.inf]], dtype=torch.float64).expand(n, 6))
    choice = FittedRule.fit(flat, [candidate("dogs", n=2), candidate("cars")])
    found = choice.infer(evidence(INPUTS[:1]), priors={"dogs": 3, "cars": 1})
    assert found.task_probabilities[0].tolist() == [pytest.approx(0.75), pytest.approx(0.25)]


@pytest.mark.parametrize(
    ("priors", "error", "named"),
    [
        ({"cats": 1.0}, ValueError, "names task 'cats', which cannot be chosen; the tasks are birds, cars"),
        ({"cars": -1.0}, ValueError, "gives task 'cars' -1.0"),
        ({"cars": math.nan}, ValueError, "gives task 'cars' nan"),
        ({"cars": math.inf}, ValueError, "gives task 'cars' inf"),
        ({"cars": "much"}, ValueError, "gives task 'cars' 'much'"),
        ({"cars": True}, ValueError, "gives task 'cars' True"),
        ({"cars": 0.0, "birds": 0}, ValueError, "gives no task more than 0"),
        ({}, ValueError, "gives no task more than 0"),
        ([0.5, 0.5], TypeError, "priors is a list; it must map tasks to numbers"),
    ],
)
def test_priors_that_are_none(priors: Any, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        chosen("cars", "birds").infer(evidence(INPUTS), priors=priors)


# Inputs of no known task


def test_the_threshold_is_a_quantile_of_the_validation_examples_distances() -> None:
    choice = chosen(*SIZES)
    distances = np.sort(choice.distances.numpy())
    n = len(distances)
    assert n == 4 * 30
    for rate in (0.01, 0.05, 0.2, 0.5):
        found = choice.threshold(rate)
        assert found in distances
        assert np.mean(distances > found) <= rate < np.mean(distances >= found) + 1 / n
    assert choice.infer(evidence(INPUTS)).threshold == choice.threshold(0.01)
    assert choice.infer(evidence(INPUTS), false_alarm_rate=0.2).threshold == choice.threshold(0.2)


def test_distances_of_validation_examples_are_those_of_inputs() -> None:
    choice = chosen("cars", "birds")
    held = torch.cat([drawn(task, 30, 2)[0] for task in ("birds", "cars")])
    found = choice.infer(evidence(held))
    np.testing.assert_allclose(found.distances.sort().values, choice.distances, rtol=1e-12)


def test_what_is_far_from_all_means_is_of_no_known_task() -> None:
    choice = chosen(*SIZES)
    inputs = torch.cat([INPUTS, INPUTS + 50])
    assert choice.infer(evidence(inputs)).is_known.tolist() == [True] * len(INPUTS) + [False] * len(INPUTS)
    assert choice.infer(evidence(inputs), threshold=math.inf).is_known.all()
    assert not choice.infer(evidence(inputs), threshold=0).is_known.any()


def test_without_validation_examples_all_is_known_and_the_temperature_is_1() -> None:
    choice = chosen(*SIZES, validation=0)
    found = choice.infer(evidence(1e3 * INPUTS))
    assert found.threshold == math.inf and found.is_known.all() and choice.temperature == 1
    assert found.distances is not None and found.distances.min() > 0


@pytest.mark.parametrize("rate", [0, 1, -0.1, math.nan, "few", True])
def test_false_alarm_rates_that_are_none(rate: Any) -> None:
    with pytest.raises(ValueError, match=r"false_alarm_rate is .* between 0 and 1"):
        chosen("cars", "birds").infer(evidence(INPUTS), false_alarm_rate=rate)


@pytest.mark.parametrize("threshold", [-1.0, math.nan, "far", False])
def test_thresholds_that_are_none(threshold: Any) -> None:
    with pytest.raises(ValueError, match=r"threshold is .* a squared distance, 0 or more"):
        chosen("cars", "birds").infer(evidence(INPUTS), threshold=threshold)


def test_calibration_takes_as_many_of_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_inference, "CALIBRATED_ON", 40)
    assert len(chosen(*SIZES).distances) == 40


def test_the_temperature_of_a_choice_is_that_of_its_validation_examples() -> None:
    choice = chosen("cars", "birds")
    (birds, of_birds), (cars, of_cars) = drawn("birds", 30, 2), drawn("cars", 30, 2)
    scores, labels = choice.scores(evidence(torch.cat([birds, cars]).double())), torch.cat([of_birds, of_cars + 3])
    assert choice.temperature == pytest.approx(best_temperature(scores, labels), rel=1e-9)


# Many tasks


def test_a_choice_does_not_keep_the_statistics_in_memory() -> None:
    known = [candidate("cars"), candidate("birds")]
    kept = [weakref.ref(each.statistics) for each in known]
    for rule in (ClosedForm(), rule_by_name("nearest-mean"), rule_by_name("most-confident")):
        choice = FittedRule.fit(rule, known)
        assert [each.name for each in choice.candidates] == ["birds", "cars"]
        held = known
        known = [Candidate(each.name, each.classes, each.statistics) for each in held]
    del known, held
    gc.collect()
    assert [each() for each in kept] == [None, None] and choice.order == ("cars", "birds")


def test_scores_of_a_batch_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    choice, score, batches = chosen("cars", "birds"), LinearScores.__call__, []
    monkeypatch.setattr(LinearScores, "__call__", lambda self, given: batches.append(1) or score(self, given))
    choice.infer(evidence(INPUTS))
    assert len(batches) == 1


# Rules that answer badly, and bad input


def test_scores_of_a_rule_are_checked() -> None:
    known = [candidate("cars", validation=0), candidate("birds", validation=0)]
    for scores, named in (
        (lambda n: torch.zeros(n, 4), r"scores have shape \[20, 4\]; it must be \[20, 5\]"),
        (lambda n: torch.full((n, 5), torch.nan), "NaN or inf"),
        (lambda n: torch.full((n, 5), torch.inf), "NaN or inf"),
        (lambda n: torch.full((n, 5), -torch.inf), "exclude every class"),
    ):
        with pytest.raises(ValueError, match=named):
            FittedRule.fit(Fixed(scores), known).infer(evidence(INPUTS))
        with pytest.raises(ValueError, match=r"the rule's scores"):  # on validation examples already
            FittedRule.fit(Fixed(scores), [candidate("cars"), candidate("birds")])


def test_priors_and_a_rule_that_together_exclude_everything_are_refused() -> None:
    def scores(n: int) -> Tensor:
        found = torch.zeros(n, 5, dtype=torch.float64)
        found[2:, 3:] = -torch.inf  # of later inputs, the rule excludes the second task by name
        return found

    choice = FittedRule.fit(Fixed(scores), [candidate("cars"), candidate("birds")])
    assert choice.infer(evidence(INPUTS), priors={"birds": 1}).task_names == ["birds"] * len(INPUTS)
    with pytest.raises(ValueError, match="priors excludes every task that the rule finds possible for input 2"):
        choice.infer(evidence(INPUTS), priors={"cars": 1})


def test_inputs_that_are_not_finite_are_named() -> None:
    inputs = INPUTS.clone()
    inputs[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"features of input 3 are not finite.*bfloat16 or float32"):
        chosen("cars", "birds").infer(evidence(inputs))


def test_without_a_task_there_is_nothing_to_choose() -> None:
    with pytest.raises(ValueError, match="no task to choose"):
        FittedRule.fit(ClosedForm(), [])


def test_a_rule_that_needs_no_statistics_has_no_distances() -> None:
    rule = rule_by_name("most-confident")
    choice = FittedRule.fit(rule, [Candidate("a", 2, None), Candidate("b", 2, None)], left_out=["c"])
    asked = {"a": torch.tensor([[0.9, 0.1]]), "b": torch.tensor([[0.4, 0.6]])}
    found = choice.infer(Evidence(torch.zeros(1, 3), lambda: asked))
    assert found.task_names == ["a"] and found.distances is None and found.is_known.all() and found.left_out == ("c",)
