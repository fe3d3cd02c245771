"""Heads in closed form against the rule that they share their formula with, scikit-learn and NumPy."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import OAS
from torch import Tensor

from qtuning_fast.method.closed_form import LabelledFeatures, LinearHead, closed_form_head, judged_head, mixed_head
from qtuning_fast.method.labels import IGNORED, MULTI, REGRESSION, SINGLE
from qtuning_fast.method.shared_gaussian import SharedGaussian
from qtuning_fast.method.statistics import FEATURES, ClassMoments, TaskStatistics


def draw(n: int, size: int, classes: int, seed: int = 0) -> LabelledFeatures:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    means = torch.randn(classes, size, generator=generator)
    return LabelledFeatures(means[labels] + torch.randn(n, size, generator=generator), labels)


def made(some: LabelledFeatures) -> LinearHead:
    return closed_form_head(some.features, some.labels, 3)


def typed(outputs: int, problem_type: str, some: LabelledFeatures) -> LinearHead:
    return closed_form_head(some.features, some.labels, outputs, problem_type)


@given(n=st.integers(1, 60), size=st.integers(1, 80), classes=st.integers(2, 5), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_classes_have_the_classifier_by_which_tasks_are_inferred(n: int, size: int, classes: int, seed: int) -> None:
    examples = draw(n, size, classes, seed)
    head = closed_form_head(examples.features, examples.labels, classes)
    moments = ClassMoments.of(examples.features, examples.labels, classes)
    nothing = torch.zeros(0, size), torch.zeros(0, dtype=torch.long)
    wanted = SharedGaussian.of([TaskStatistics({FEATURES: moments}, *nothing)]).linear
    seen = moments.seen
    for ours, theirs in ((head.weight, wanted.weight), (head.bias, wanted.bias)):  # what all classes share is free
        theirs = theirs[seen] - theirs[seen].mean(0)
        torch.testing.assert_close(ours[seen] - ours[seen].mean(0), theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0])
def test_how_far_features_are_from_zero_does_not_matter(offset: float) -> None:
    near, far = draw(30, 384, 3), draw(30, 384, 3)
    far = LabelledFeatures(far.features.double() + offset, far.labels)
    test = draw(300, 384, 3)
    answers = [made(some)(test.features.double() + shift).argmax(1) for some, shift in ((near, 0.0), (far, offset))]
    assert torch.equal(*answers)
    head, losses = judged_head(made, far, None)
    assert len(losses) == 30 and (head.mixed([head])(test.features.double() + offset).argmax(1) == answers[0]).all()


def test_numbers_have_the_regression_with_a_shrunk_covariance() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 12))
    y = x @ generator.normal(size=(12, 2)) + 3
    head = closed_form_head(torch.from_numpy(x), torch.from_numpy(y), 2, REGRESSION)
    centred = x - x.mean(0)
    # scikit-learn divides by n where the scatter is divided by n - 1 here, which changes the shrinkage a little
    weight = np.linalg.solve(OAS().fit(x).covariance_ * 40 / 39, centred.T @ (y - y.mean(0)) / 39).T
    np.testing.assert_allclose(head.weight, weight, rtol=0.03, atol=0.03)
    np.testing.assert_allclose(head(torch.from_numpy(x)).mean(0), y.mean(0))
    constant = closed_form_head(torch.ones(4, 3), torch.full((4, 1), 2.0), 1, REGRESSION)
    torch.testing.assert_close(constant(torch.randn(5, 3)), torch.full((5, 1), 2.0, dtype=torch.float64))


def test_each_of_several_labels_has_log_odds_with_its_own_prior() -> None:
    examples = draw(60, 6, 3)
    labels = torch.stack([examples.labels == 0, examples.labels != 1, torch.ones(60)], 1).double()
    labels[5, 0] = IGNORED
    head = closed_form_head(examples.features, labels, 3, MULTI)
    counts = labels[:, 0] != IGNORED
    there = labels[counts, 0].long()
    two = closed_form_head(examples.features[counts], there, 2)
    torch.testing.assert_close(head.weight[0], two.weight[1] - two.weight[0])
    prior = math.log((int(there.sum()) + 1) / (len(there) - int(there.sum()) + 1))
    assert float(head.bias[0]) == pytest.approx(float(two.bias[1] - two.bias[0]) + prior)
    assert not head.weight[2].any() and float(head.bias[2]) == pytest.approx(math.log(61))  # it is always there
    answers = head(examples.features) > 0
    assert (answers == (labels > 0))[counts].double().mean() > 0.8


def test_an_example_that_is_left_out_does_not_count() -> None:
    examples = draw(20, 5, 2)
    labels = examples.labels.clone()
    labels[::3] = IGNORED
    kept = labels != IGNORED
    one = closed_form_head(examples.features, labels, 2)
    other = closed_form_head(examples.features[kept], labels[kept], 2)
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_a_head_is_judged_by_examples_that_it_was_not_made_from() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = LabelledFeatures(torch.randn(30, 200, generator=generator), torch.arange(30) % 3)
    head = made(noise)
    assert (head(noise.features).argmax(1) == noise.labels).all()  # it knows its own examples by heart
    losses = judged_head(made, noise, None)[1]
    assert len(losses) == 30 and float(losses.mean()) == pytest.approx(math.log(3), abs=0.1)
    told = draw(60, 10, 3)
    assert judged_head(made, told, None)[1].mean() < 0.7


def test_the_temperature_scales_the_head_and_not_its_order() -> None:
    examples, validation = draw(30, 20, 3), draw(30, 20, 3, seed=0)
    head, losses = judged_head(made, examples, validation)
    plain = made(examples)
    factor = float(head.weight.norm() / plain.weight.norm())
    torch.testing.assert_close(head.weight, plain.weight * factor)
    torch.testing.assert_close(head.bias, plain.bias * factor)
    assert len(losses) == 60 and 0 < losses.mean() < math.log(3)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_one_example_a_class_leaves_nothing_to_judge_by(n: int) -> None:
    examples = draw(n, 4, 3)
    head, losses = judged_head(made, examples, None)
    assert len(losses) == 0 and head.weight.isfinite().all()
    losses = judged_head(made, examples, draw(9, 4, n))[1]
    assert 0 < len(losses) <= 9 and losses.isfinite().all()


def test_labels_and_numbers_are_judged_too() -> None:
    examples = draw(40, 5, 2)
    numbers = LabelledFeatures(examples.features, examples.features[:, :1] * 2)
    losses = judged_head(partial(typed, 1, REGRESSION), numbers, None, REGRESSION)[1]
    assert losses.mean() < 0.5 * float(numbers.labels.var())
    labels = torch.stack([examples.labels, 1 - examples.labels], 1).double()
    both = LabelledFeatures(examples.features, labels)
    assert judged_head(partial(typed, 2, MULTI), both, None, MULTI)[1].mean() < math.log(2)


def head_of(*rows: list[float]) -> LinearHead:
    values = torch.tensor(rows, dtype=torch.float64)
    return LinearHead(values[:, :-1], values[:, -1])


def same_answers(one: LinearHead, other: LinearHead) -> bool:
    x = torch.randn(200, one.weight.shape[1], generator=torch.Generator().manual_seed(0))
    return bool((one(x).argmax(1) == other(x).argmax(1)).all())


def test_a_mixture_depends_neither_on_the_scale_of_heads_nor_on_what_they_add_to_all_classes() -> None:
    a, b = head_of([1.0, 2, 0.3], [0, -1, 0.1]), head_of([2.0, -1, 0], [1, 1, 1])
    mixed = a.mixed([b])
    shifted = LinearHead(b.weight + torch.tensor([5.0, 3.0]), b.bias + 7).scaled(40)
    torch.testing.assert_close(a.mixed([shifted]).weight, mixed.weight)
    torch.testing.assert_close(a.mixed([shifted]).bias, mixed.bias)
    assert same_answers(a.mixed([a.scaled(3)]), a)
    torch.testing.assert_close(a.mixed([b, b.scaled(9)]).weight, mixed.weight)  # the others count as one
    assert not same_answers(mixed, a)


def test_a_class_that_no_example_has_is_last_but_can_be_learned() -> None:
    examples = draw(20, 4, 2)
    head = closed_form_head(examples.features, examples.labels, 3)
    outputs = head(examples.features)
    assert (outputs.argmax(1) < 2).all() and float(outputs[:, 2].max()) == pytest.approx(float(outputs[:, :2].min()))
    assert not head.weight[2].any()
    nothing = closed_form_head(examples.features[:0], examples.labels[:0], 3)
    assert not nothing.weight.any() and not nothing.bias.any()


def test_all_heads_are_judged_by_the_same_examples() -> None:
    examples = draw(40, 8, 3)
    labels = examples.labels.clone()
    labels[labels == 2] = 0
    labels[0] = 2  # one example of a class, which no other fold shows
    some, other = LabelledFeatures(examples.features, labels), head_of(*torch.randn(3, 9).tolist())
    plain = judged_head(made, some, draw(12, 8, 3))[1]
    mixed = judged_head(lambda rest: made(rest).mixed([other]), some, draw(12, 8, 3))[1]
    assert len(plain) == len(mixed) == 39 + 12


def outputs_of(head: LinearHead) -> Tensor:
    return head(torch.eye(head.weight.shape[1]))


def test_a_head_without_weights_mixes_without_a_division_by_zero() -> None:
    nothing = LinearHead(torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    other = head_of([1.0, 0, 0, 0], [0, 1, 0, 0])
    assert outputs_of(nothing.mixed([nothing])).isfinite().all() and same_answers(nothing.mixed([other]), other)
    assert SINGLE.startswith("single")


def test_a_trained_head_is_mixed_with_the_closed_form_of_all_examples() -> None:
    """It points where both point, and is as confident as the validation examples allow."""
    examples, validation = (draw(60, 8, 3).rows(torch.arange(*bounds)) for bounds in ((0, 24), (24, 60)))
    trained = LinearHead(
        torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).double(), torch.zeros(3).double()
    )
    head = mixed_head(trained, examples, validation, 3)
    both = examples.beside(validation)
    assert len(both) == 60 and torch.equal(both.features[24:], validation.features)
    wanted = trained.of_unit_norm().weight + made(both).of_unit_norm().weight
    factor = head.weight.norm() / wanted.norm()
    torch.testing.assert_close(head.weight - head.weight.mean(0), factor * (wanted - wanted.mean(0)))
    again = mixed_head(trained.scaled(50.0), examples, validation, 3)  # its scale does not matter
    torch.testing.assert_close(again.weight, head.weight)
    worse = mixed_head(trained, examples, LabelledFeatures(validation.features, validation.labels.flip(0)), 3)
    assert worse.weight.norm() < head.weight.norm()  # validation examples that it gets wrong make it less sure


def test_a_trained_head_without_validation_examples_that_count_keeps_its_direction() -> None:
    examples = draw(24, 8, 3)
    ignored = LabelledFeatures(examples.features[:6], torch.full((6,), IGNORED))
    trained = LinearHead(
        torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).double(), torch.zeros(3).double()
    )
    head = mixed_head(trained, examples, ignored, 3)
    wanted = trained.of_unit_norm().weight + made(examples).of_unit_norm().weight
    torch.testing.assert_close(head.weight, wanted)
