"""Gaussians of classes: moments as NumPy has them, and draws that have these moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qtuning_fast.lifelong.class_gaussians import CENTROIDS, KINDS, RIDGE, ClassGaussians


def examples(count: int, *, seed: int = 0, features: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=draw) @ torch.randn(features, features, generator=draw)
    labels = torch.arange(count) % 2 * 2  # classes 0 and 2
    return x + labels[:, None], labels


def covariance(gaussians: ClassGaussians, place: int) -> np.ndarray:
    factor = gaussians.factors[place]
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


def test_centroids_are_means_of_their_examples() -> None:
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = (middles[:, None] + torch.tensor([[0.1, 0.0], [-0.1, 0.0]])).flatten(0, 1)
    x = torch.cat([x] * 4)
    gaussians = ClassGaussians.of(x, torch.zeros(len(x), dtype=torch.long), "centroids")
    assert len(gaussians.means) == 6  # as many as there are different examples
    found = {tuple(np.round(mean, 6)) for mean in gaussians.means.tolist()}
    assert found == {tuple(np.round(each, 6)) for each in x.tolist()}
    many, labels = examples(300)
    gaussians = ClassGaussians.of(many, labels, "centroids")
    assert torch.bincount(gaussians.classes).tolist() == [CENTROIDS, 0, CENTROIDS]
    assert torch.allclose(gaussians.class_means()[0], gaussians.means[gaussians.classes == 0].mean(0))
    again = ClassGaussians.of(many, labels, "centroids")
    assert all(torch.equal(x, again.tensors()[name]) for name, x in gaussians.tensors().items())


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_moments(kind: str) -> None:
    x, labels = examples(60)
    gaussians = ClassGaussians.of(x, labels, kind)
    drawn, classes = gaussians.sample(20_000, torch.Generator().manual_seed(1))
    assert drawn.shape == (len(gaussians.means) * 20_000, 5) and drawn.dtype == torch.float64
    for place in range(len(gaussians.means)):
        mine = drawn[place * 20_000 : (place + 1) * 20_000].numpy()
        assert (classes[place * 20_000 : (place + 1) * 20_000] == gaussians.classes[place]).all()
        expected = covariance(gaussians, place)
        spread = np.sqrt(np.diag(expected))
        assert (np.abs(mine.mean(0) - gaussians.means[place].numpy()) < 5 * spread / np.sqrt(20_000)).all()
        assert (np.abs(np.cov(mine, rowvar=False) - expected) < 0.06 * np.outer(spread, spread)).all()


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
    with pytest.raises(ValueError, match="no example"):
        ClassGaussians.of(x[:0], labels[:0])
    with pytest.raises(ValueError, match="not finite"):
        ClassGaussians.of(x.log(), labels)
    with pytest.raises(ValueError, match="'means' is missing"):
        ClassGaussians.from_tensors({})
