"""Gaussians of classes: moments as NumPy has them, and draws that have these moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qtuning_fast.method.class_gaussians import KINDS, RIDGE, ClassGaussians


def examples(count: int, *, seed: int = 0, features: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=draw) @ torch.randn(features, features, generator=draw)
    labels = torch.arange(count) % 2 * 2  # classes 0 and 2
    return x + labels[:, None], labels


def covariance(gaussians: ClassGaussians, place: int) -> np.ndarray:
    factor = gaussians.factors[gaussians.factor_of[place]]
    return (factor.mT @ factor + torch.diag(gaussians.variances[place] + RIDGE)).numpy()


@pytest.mark.parametrize("count", [6, 40])
def test_covariance_and_variance_are_numpys(count: int) -> None:
    x, labels = examples(count)
    whole, diagonal = (ClassGaussians.of(x, labels, kind) for kind in ("covariance", "variance"))
    for place, label in enumerate((0, 2)):
        mine = x[labels == label].double().numpy()
        expected = np.cov(mine, rowvar=False) + RIDGE * np.eye(5)
        for gaussians in (whole, diagonal):
            assert int(gaussians.classes[place]) == label
            np.testing.assert_allclose(gaussians.means[place], mine.mean(0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(covariance(whole, place), expected, rtol=0, atol=1e-8)
        np.testing.assert_allclose(covariance(diagonal, place), np.diag(np.diag(expected)), rtol=0, atol=1e-8)
    assert whole.factors.shape == (2, min(count // 2, 5), 5) and diagonal.factors.shape == (2, 0, 5)


def halves(x: Tensor) -> Tensor:
    """Two clusters, by the first feature."""
    return (x[:, 0] > x[:, 0].median()).long()


def test_centroids_are_means_of_their_examples() -> None:
    x, labels = examples(60)
    gaussians = ClassGaussians.of(x, labels, "centroids", clustered=halves)
    assert gaussians.classes.tolist() == [0, 0, 2, 2] and gaussians.factors.shape == (2, 0, 5)
    for place, label in enumerate((0, 2)):
        mine = x[labels == label].double()
        for half in range(2):
            part = mine[halves(mine) == half].numpy()
            np.testing.assert_allclose(gaussians.means[2 * place + half], part.mean(0), rtol=0, atol=1e-8)
            np.testing.assert_allclose(gaussians.variances[2 * place + half], part.var(0), rtol=0, atol=1e-8)
        assert torch.allclose(gaussians.class_means()[place], mine.mean(0))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_moments(kind: str) -> None:
    x, labels = examples(60)
    gaussians = ClassGaussians.of(x, labels, kind, clustered=halves if kind == "centroids" else None)
    drawn, classes = gaussians.sample(40_000, torch.Generator().manual_seed(1))
    assert drawn.shape == (2 * 40_000, 5) and drawn.dtype == torch.float64
    assert torch.bincount(classes).tolist() == [40_000, 0, 40_000]
    numbers = gaussians._counts(40_000)
    assert numbers == ([20_000] * 4 if kind == "centroids" else [40_000] * 2)
    for place, mine in enumerate(part.numpy() for part in drawn.split(numbers)):
        expected = covariance(gaussians, place)
        spread = np.sqrt(np.diag(expected))
        assert (np.abs(mine.mean(0) - gaussians.means[place].numpy()) < 5 * spread / np.sqrt(len(mine))).all()
        assert (np.abs(np.cov(mine, rowvar=False) - expected) < 0.06 * np.outer(spread, spread)).all()


def test_each_class_is_drawn_as_often_whatever_its_clusters() -> None:
    x = torch.arange(7.0)[:, None].expand(7, 2)
    thirds = ClassGaussians.of(
        x, torch.zeros(7, dtype=torch.long), "centroids", clustered=lambda x: (x[:, 0] // 3).long()
    )
    assert thirds.shares.tolist() == pytest.approx([3 / 7, 3 / 7, 1 / 7])
    for count in (1, 2, 10, 14):
        numbers = thirds._counts(count)
        assert sum(numbers) == count and all(abs(n - share * count) <= 1 for n, share in zip(numbers, thirds.shares))


def test_a_single_example_and_saving() -> None:
    one = ClassGaussians.of(torch.ones(1, 3), torch.tensor([4]))
    drawn, classes = one.sample(200, torch.Generator().manual_seed(0))
    assert (drawn - 1).abs().max() < 6 * RIDGE**0.5 and set(classes.tolist()) == {4}
    again = ClassGaussians.from_tensors(one.tensors())
    assert all(torch.equal(x, again.tensors()[name]) for name, x in one.tensors().items())


def test_tasks_are_joined() -> None:
    few, many = (ClassGaussians.of(*examples(count)) for count in (4, 40))
    both = ClassGaussians.joined([few, many], [0, 3])
    assert both.classes.tolist() == [0, 2, 3, 5]
    for place, (part, mine) in enumerate([(few, 0), (few, 1), (many, 0), (many, 1)]):
        np.testing.assert_allclose(covariance(both, place), covariance(part, mine), rtol=0, atol=1e-12)
        assert torch.equal(both.means[place], part.means[mine])


def test_what_is_refused() -> None:
    x, labels = examples(6)
    with pytest.raises(ValueError, match=r"kind is 'full'; it must be one of covariance, variance, centroids"):
        ClassGaussians.of(x, labels, "full")
    with pytest.raises(ValueError, match="clustered must divide"):
        ClassGaussians.of(x, labels, "centroids")
    with pytest.raises(ValueError, match="no example"):
        ClassGaussians.of(x[:0], labels[:0])
    with pytest.raises(ValueError, match="not finite"):
        ClassGaussians.of(x.log(), labels)
    with pytest.raises(ValueError, match="'means' is missing"):
        ClassGaussians.from_tensors({})
