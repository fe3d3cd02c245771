"""What is kept of a task's examples: counts, means and scatter, however the examples are split and merged."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from qtuning_fast.method.statistics import (
    FEATURES,
    KEPT_FOR_CALIBRATION,
    ClassMoments,
    Recorder,
    TaskStatistics,
    spread,
    validation_of,
)


def examples(n: int, size: int, classes: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features around one mean a class, far from zero, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    means = torch.randn(classes, size, generator=generator, dtype=torch.float64) + 3
    features = means[labels] + torch.randn(n, size, generator=generator, dtype=torch.float64)
    return (scale * features).float(), labels


def recorded(features: Tensor, labels: Tensor, classes: int, **maps: Any) -> TaskStatistics:
    recorder = Recorder(classes, maps)
    recorder.add(features, labels)
    return recorder.finish()


def by_numpy(features: Tensor, labels: Tensor, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, means (zero where there is no example) and scatter, by their definitions."""
    x, y = features.double().numpy(), labels.numpy()
    size = x.shape[1]
    counts, means, scatter = np.zeros(classes, dtype=int), np.zeros((classes, size)), np.zeros((size, size))
    for c in range(classes):
        of_class = x[y == c]
        counts[c] = len(of_class)
        if len(of_class):
            means[c] = of_class.mean(0)
            scatter += (of_class - means[c]).T @ (of_class - means[c])
    return counts, means, scatter


def assert_moments(found: ClassMoments, expected: tuple[np.ndarray, ...], tolerance: float = 1e-10) -> None:
    counts, means, scatter = expected
    assert found.counts.tolist() == counts.tolist()
    np.testing.assert_allclose(found.means, means, rtol=0, atol=tolerance * max(1, abs(means).max(initial=0)))
    np.testing.assert_allclose(found.scatter, scatter, rtol=0, atol=tolerance * max(1, abs(scatter).max(initial=0)))
    assert torch.equal(found.factor, found.factor.triu())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    size=st.integers(1, 12),
    classes=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    recorders=st.integers(1, 4),
    sent=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_split_into_batches_and_recorders_gives_the_moments_of_the_whole(
    n: int, size: int, classes: int, cuts: Sequence[int], recorders: int, sent: bool, seed: int
) -> None:
    features, labels = examples(n, size, classes, seed)
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    parts = [Recorder(classes) for _ in range(recorders)]
    for place, (start, stop) in enumerate(pairwise(edges)):
        part = parts[place % recorders]
        part.add(features[start:stop], labels[start:stop])  # empty batches included
    together = Recorder(classes)
    for part in parts:
        together.absorb(pickle.loads(pickle.dumps(part)) if sent else part)
    found = together.finish()
    assert_moments(found.features, by_numpy(features, labels, classes))
    assert len(found.features.factor) <= size
    assert found.classes == classes and found.hidden_size == size


def test_rows_are_counted_before_they_grow_without_bound() -> None:
    features, labels = examples(5000, 3, 2)
    recorder = Recorder(2)
    for start in range(0, 5000, 7):
        recorder.add(features[start : start + 7], labels[start : start + 7])
        assert sum(len(each) for each, _ in recorder._waiting) < 1024
    assert_moments(recorder.finish().features, by_numpy(features, labels, 2))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_tiny_and_huge_features_keep_their_digits(scale: float) -> None:
    features, labels = examples(50, 5, 3, scale=scale)
    found = recorded(features, labels, 3).features
    _, means, scatter = by_numpy(features, labels, 3)
    np.testing.assert_allclose(found.means, means, rtol=1e-12)
    np.testing.assert_allclose(found.scatter, scatter, rtol=0, atol=1e-12 * abs(scatter).max())


def test_a_small_spread_around_a_large_mean_is_not_lost() -> None:
    """Sums of squares would lose it: the squares of the mean and of the spread are sixteen digits apart."""
    generator = torch.Generator().manual_seed(0)
    x = 1e6 + 1e-2 * torch.randn(60, 4, generator=generator, dtype=torch.float64)
    whole = ClassMoments.of(x, torch.zeros(60, dtype=torch.long), 1)
    halves = [ClassMoments.of(half, torch.zeros(len(half), dtype=torch.long), 1) for half in (x[:25], x[25:])]
    expected = np.cov(x.T.numpy(), bias=True) * 60
    np.testing.assert_allclose(whole.scatter, expected, rtol=1e-6)
    np.testing.assert_allclose(halves[0].merged(halves[1]).scatter, expected, rtol=1e-6)


def test_the_scatter_is_what_scikit_learn_calls_the_pooled_covariance() -> None:
    features, labels = examples(80, 4, 3)
    found = recorded(features, labels, 3).features
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(features.double().numpy(), labels.numpy())
    np.testing.assert_allclose(found.scatter / 80, theirs.covariance_, atol=1e-12)
    np.testing.assert_allclose(found.means, theirs.means_, atol=1e-12)


def test_few_examples_take_few_rows() -> None:
    """A few-shot task keeps no F² numbers."""
    features, labels = examples(6, 50, 3)
    found = recorded(features, labels, 3).features
    assert found.factor.shape == (6, 50)
    assert_moments(found, by_numpy(features, labels, 3))


def test_a_class_without_an_example_has_a_count_of_zero() -> None:
    features, labels = torch.ones(2, 3), torch.tensor([0, 2])
    found = recorded(features, labels, 4)
    assert found.features.seen.tolist() == [True, False, True, False]
    assert found.features.means.isfinite().all() and not found.features.scatter.any()


def test_moments_of_another_map_are_those_of_what_it_makes() -> None:
    features, labels = examples(30, 4, 2)
    recorder = Recorder(2, {"squares": lambda x: x.square()[:, :3]})
    for start in range(0, 30, 11):
        recorder.add(features[start : start + 11], labels[start : start + 11])
    found = recorder.finish()
    assert_moments(found.moments["squares"], by_numpy(features.double().square()[:, :3], labels, 2))
    assert_moments(found.features, by_numpy(features, labels, 2))


def test_a_recorder_goes_to_another_process_without_its_maps() -> None:
    features, labels = examples(30, 4, 2)
    maps = {"squares": lambda x: x.square()}  # which cannot be pickled
    first, second = Recorder(2, maps), Recorder(2, maps)
    first.add(features[:13], labels[:13])
    second.add(features[13:], labels[13:])
    first.absorb(pickle.loads(pickle.dumps(second)))
    assert_moments(first.finish().moments["squares"], by_numpy(features.double().square(), labels, 2))


# Validation examples


def test_validation_examples_are_kept_and_not_counted() -> None:
    features, labels = examples(20, 4, 3)
    recorder = Recorder(3)
    recorder.add(features[:12], labels[:12])
    found = recorder.finish([(features[12:15], labels[12:15]), (features[15:], labels[15:])])
    assert torch.equal(found.validation_features, features[12:]) and torch.equal(found.validation_labels, labels[12:])
    assert_moments(found.features, by_numpy(features[:12], labels[:12], 3))


def test_of_many_validation_examples_an_even_spread_is_kept_whatever_their_order() -> None:
    features, labels = examples(500, 4, 3)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    kept = []
    for chosen in (torch.arange(500), order):
        recorder = Recorder(3)
        recorder.add(features[:5], labels[:5])
        found = recorder.finish([(features[chosen].half(), labels[chosen])])
        assert found.validation_features.shape == (KEPT_FOR_CALIBRATION, 4)
        assert found.validation_features.dtype == torch.float32
        kept.append({(*row, label) for row, label in zip(found.validation_features.tolist(), found.validation_labels)})
    assert {row[:4] for row in kept[0]} == {row[:4] for row in kept[1]}
    all_rows = {tuple(row) for row in features.half().float().tolist()}
    assert {row[:4] for row in kept[0]} <= all_rows


def test_a_spread_reaches_from_one_end_to_the_other() -> None:
    features = torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))][:, None]
    found = features[spread(features, 11)].flatten().sort().values
    assert found.tolist() == [45, 136, 227, 318, 409, 500, 590, 681, 772, 863, 954]
    assert spread(features[:7], 11).tolist() == list(range(7))


# Saving and bad input


def test_statistics_survive_as_tensors_by_name() -> None:
    features, labels = examples(20, 4, 3)
    recorder = Recorder(3, {"relu-5.0": lambda x: x.relu()})  # a dot in the name
    recorder.add(features, labels)
    found = recorder.finish([(features[:4], labels[:4])])
    again = TaskStatistics.from_tensors(found.tensors())
    assert again.moments.keys() == {FEATURES, "relu-5.0"}
    assert all(torch.equal(x, again.tensors()[name]) for name, x in found.tensors().items())


def test_tensors_that_are_no_statistics_are_refused() -> None:
    features, labels = examples(20, 4, 3)
    recorder = Recorder(3)
    recorder.add(features, labels)
    right = recorder.finish([(features[:4], labels[:4])]).tensors()
    for name in right:
        with pytest.raises(ValueError, match=r"not statistics of a task.*missing"):
            TaskStatistics.from_tensors({key: x for key, x in right.items() if key != name})
    wrong = {
        "features.counts": [-right["features.counts"], right["features.counts"][:2], torch.zeros(3, dtype=torch.long)],
        "features.means": [right["features.means"].float(), right["features.means"][:, :3], torch.zeros(3)],
        "features.factor": [right["features.factor"] * torch.nan, right["features.factor"][:, :3], torch.zeros(())],
        "validation.features": [torch.zeros(4, 3), torch.full((4, 4), torch.inf), right["validation.features"].long()],
        "validation.labels": [torch.full((4,), 3), torch.zeros(5).long(), torch.zeros(4), torch.zeros(4, 1).long()],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match="not statistics of a task"):
                TaskStatistics.from_tensors(right | {name: value})


def test_statistics_made_by_hand_are_checked_too() -> None:
    features, labels = examples(20, 4, 3)
    found = recorded(features, labels, 3)
    with pytest.raises(ValueError, match="not statistics of a task"):
        replace(found, validation_features=torch.zeros(1, 5), validation_labels=torch.zeros(1).long())
    other = recorded(features[1:], labels[1:], 3).features
    with pytest.raises(ValueError, match="not statistics of a task"):
        TaskStatistics({FEATURES: found.features, "of others": other}, torch.zeros(0, 4), torch.zeros(0).long())
    with pytest.raises(ValueError, match="'features' are missing"):
        TaskStatistics({}, torch.zeros(0, 4), torch.zeros(0).long())


@pytest.mark.parametrize(
    ("features", "labels", "named"),
    [
        (torch.zeros(2, 3), torch.zeros(3).long(), r"2 examples, but labels has shape \[3\]"),
        (torch.zeros(2, 3), torch.zeros(2, 1).long(), r"labels has shape \[2, 1\]"),
        (torch.tensor([[1.0, torch.nan, 0.0]]), torch.tensor([0]), "not finite.*bfloat16 or float32"),
        (torch.zeros(2, 3), torch.tensor([0, 2]), "labels holds 2; the task has 2 classes, so it must be 0 to 1"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "labels holds -1; the task has 2 classes"),
        (torch.zeros(3), torch.zeros(3).long(), r"features has shape \[3\]; it must be \[n, 3\]"),
        (torch.zeros(2, 4), torch.zeros(2).long(), r"features has shape \[2, 4\]; it must be \[n, 3\]"),
    ],
)
def test_bad_examples_are_refused_and_nothing_is_counted(features: Tensor, labels: Tensor, named: str) -> None:
    recorder = Recorder(2)
    recorder.add(torch.ones(1, 3), torch.tensor([1]))
    with pytest.raises(ValueError, match=named):
        recorder.add(features, labels)
    with pytest.raises(ValueError, match=named):
        recorder.finish([(features, labels)])
    assert recorder.finish().features.counts.tolist() == [0, 1]


def test_without_an_example_there_are_no_statistics() -> None:
    recorder = Recorder(2)
    for _ in range(2):
        with pytest.raises(ValueError, match="no examples to record statistics of"):
            recorder.finish()
        recorder.add(torch.zeros(0, 3), torch.zeros(0).long())


# Examples to calibrate on


def test_validation_examples_of_tasks_are_numbered_among_all_classes() -> None:
    first = Recorder(3)
    first.add(*examples(20, 2, 3))
    unseen = Recorder(3)  # of class 2
    unseen.add(*examples(20, 2, 2))
    held = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    given = torch.eye(3)[:, :2], torch.tensor([2, 1, 0])
    found, classes = validation_of([first.finish([held]), unseen.finish([given])])
    assert classes.tolist() == [0, 1, 2, 0, 1, 2, 3 + 1, 3 + 0]  # the class without an example is left out
    assert torch.equal(found[6:], torch.eye(3)[1:, :2])


def test_where_not_all_validation_examples_count_those_that_do_are_spread() -> None:
    """64 of each task are kept, in the order of a projection; the first of them would all lie on one side."""
    x = torch.linspace(-1, 1, 201)[:, None]
    recorder = Recorder(1)
    recorder.add(x[:2], torch.zeros(2).long())
    known = [recorder.finish([(x, torch.zeros(201).long())])] * 3
    found, labels = validation_of(known, most=16)
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    for its in found.split(5):
        assert its.sort(dim=0).values.flatten().tolist() == pytest.approx([-0.8, -0.4, 0, 0.4, 0.8], abs=0.04)
    assert len(validation_of(known, most=2)[0]) == 3  # at least one of each
