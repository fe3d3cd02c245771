"""The temperature is that of brute force, found in few passes, and finite where scores are right or say nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from qtuning_fast.method import temperature
from qtuning_fast.method.temperature import best_temperature


def log_loss(scores: np.ndarray, labels: np.ndarray, T: float) -> float:
    return float(-log_softmax(scores / T, axis=1)[np.arange(len(labels)), labels].mean())


def by_brute_force(scores: np.ndarray, labels: np.ndarray) -> float:
    """The warmest T on a grid, then by bisection, at which the loss is least or what Laplace's rule warrants."""
    n = len(labels)
    warranted = math.log((n + 2) / (n + 1))
    centre = math.log(np.abs(scores - scores[np.arange(n), labels][:, None]).max() + 1e-300)
    grid = np.linspace(centre - 12, centre + 20, 160)
    losses = np.array([log_loss(scores, labels, math.exp(t)) for t in grid])
    place = int(losses.argmin())
    low, high = grid[max(0, place - 1)], grid[min(len(grid) - 1, place + 1)]
    best = minimize_scalar(lambda t: log_loss(scores, labels, math.exp(t)), bounds=(low, high), method="bounded")
    if best.fun >= warranted:
        return math.exp(best.x)
    low, high = best.x, grid[-1]  # the loss rises with T from there on
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if log_loss(scores, labels, math.exp(middle)) < warranted else (low, middle)
    return math.exp(low)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 60),
    classes=st.integers(2, 6),
    right=st.floats(0, 6),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_the_temperature_is_that_of_brute_force(n: int, classes: int, right: float, scale: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.integers(classes, size=n)
    scores = draw.normal(size=(n, classes))
    scores[np.arange(n), labels] += right
    scores *= scale
    found = best_temperature(torch.tensor(scores), torch.tensor(labels))
    expected = by_brute_force(scores, labels)
    wanted = max(log_loss(scores, labels, expected), math.log((n + 2) / (n + 1)))
    assert log_loss(scores, labels, found) == pytest.approx(wanted, abs=1e-7)
    if expected < 50 * scale:  # warmer, the loss is flat: scores say nothing
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 64, 2048])
def test_where_there_are_no_errors_the_loss_is_what_so_many_right_answers_warrant(n: int) -> None:
    scores = torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = scores.argmax(1)
    scores[torch.arange(n), labels] += 1
    T = best_temperature(scores, labels)
    assert log_loss(scores.numpy(), labels.numpy(), T) == pytest.approx(math.log((n + 2) / (n + 1)), rel=1e-9)


def test_the_temperature_goes_with_the_scale_of_the_scores() -> None:
    draw = np.random.default_rng(0)
    scores, labels = torch.tensor(draw.normal(size=(50, 3))), torch.tensor(draw.integers(3, size=50))
    scores[torch.arange(50), labels] += 1
    one = best_temperature(scores, labels)
    for scale in (1e-9, 1e9):
        assert best_temperature(scale * scores + 7 * scale, labels) == pytest.approx(scale * one, rel=1e-6)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [([[3.0]], [0]), ([[1.0, 1.0], [2.0, 2.0]], [0, 1]), ([[5.0, -math.inf]], [0]), ([[-math.inf, 5.0]], [0])],
    ids=["one class", "all alike", "all others excluded", "the right one excluded"],
)
def test_where_scores_tell_nothing_the_temperature_is_1(scores: list[list[float]], labels: list[int]) -> None:
    assert best_temperature(torch.tensor(scores, dtype=torch.float64), torch.tensor(labels)) == 1


def test_an_excluded_class_does_not_count_and_neither_does_an_example_of_it() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(40, 3, generator=draw, dtype=torch.float64), torch.arange(40) % 2
    expected = best_temperature(scores[:, :2], labels)
    scores[:, 2] = -torch.inf
    assert best_temperature(scores, labels) == pytest.approx(expected, rel=1e-12)
    more = torch.cat([scores, torch.tensor([[1.0, 2.0, -torch.inf]], dtype=torch.float64)])
    assert best_temperature(more, torch.cat([labels, torch.tensor([2])])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("right", [0.0, 1.0, 3.0, 6.0, 50.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_temperature_takes_few_passes_over_the_scores(
    right: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, root = [], temperature._root

    def counted(function: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
        return root(lambda at: passes.append(at) or function(at), low, high)

    monkeypatch.setattr(temperature, "_root", counted)
    scores = torch.randn(400, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[torch.arange(400), torch.arange(400) % 30] += right
    best_temperature(scale * scores, torch.arange(400) % 30)
    assert 0 < len(passes) <= 20


def test_a_temperature_does_not_depend_on_how_many_scores_are_calibrated_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[::3, 6] = -torch.inf
    at_once = best_temperature(scores, torch.arange(50) % 6)
    monkeypatch.setattr(temperature, "_BLOCK", 3 * 7)
    assert best_temperature(scores, torch.arange(50) % 6) == pytest.approx(at_once, rel=1e-13)
