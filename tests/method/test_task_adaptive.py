"""TAP is gradient descent with momentum on pseudo-features, as NumPy computes it; it makes heads comparable."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtuning_fast.method.class_gaussians import ClassGaussians
from qtuning_fast.method.closed_form import LinearHead
from qtuning_fast.method.task_adaptive import Rebalancing, rebalanced


def some(classes: int = 3, features: int = 4) -> tuple[LinearHead, ClassGaussians]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(classes * 8, features, generator=draw)
    labels = torch.arange(classes * 8) % classes
    x[:, 0] += 3 * labels
    head = LinearHead(torch.randn(classes, features, generator=draw).double(), torch.zeros(classes).double())
    return head, ClassGaussians.of(x, labels)


def by_numpy(head: LinearHead, gaussians: ClassGaussians, how: Rebalancing) -> tuple[np.ndarray, np.ndarray]:
    """The definition: v ← μ v + g, w ← w − η v, with g the mean gradient of the log-loss plus the decay."""
    draw = torch.Generator().manual_seed(0)
    weight, bias = head.weight.numpy().copy(), head.bias.numpy().copy()
    speeds = [np.zeros_like(weight), np.zeros_like(bias)]
    for epoch in range(how.epochs):
        rate = how.rate * (1 + np.cos(np.pi * epoch / how.epochs)) / 2
        features, labels = (each.numpy() for each in gaussians.sample(how.drawn, draw))
        order = torch.randperm(len(labels), generator=draw).numpy()
        for first in range(0, len(order), how.drawn):
            x, y = features[order[first : first + how.drawn]], labels[order[first : first + how.drawn]]
            logits = x @ weight.T + bias
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            p[np.arange(len(y)), y] -= 1
            p /= len(y)
            for place, (value, grad) in enumerate(((weight, p.T @ x), (bias, p.sum(0)))):
                speeds[place] = how.momentum * speeds[place] + grad + how.weight_decay * value
                value -= rate * speeds[place]
    return weight, bias


@pytest.mark.parametrize("kind", ["covariance", "centroids"])
def test_it_is_what_numpy_computes(kind: str) -> None:
    head, gaussians = some()
    x, labels = gaussians.sample(8, torch.Generator().manual_seed(3))
    gaussians = ClassGaussians.of(x, labels, kind, clustered=lambda x: (x[:, 1] > 0).long())
    how = Rebalancing(epochs=4, rate=0.05, drawn=7)
    found = rebalanced(head, gaussians, how)
    for mine, expected in zip((found.weight, found.bias), by_numpy(head, gaussians, how)):
        np.testing.assert_allclose(mine.numpy(), expected, rtol=0, atol=1e-8)


def test_a_head_that_prefers_the_newest_classes_is_balanced() -> None:
    head, gaussians = some()
    tilted = LinearHead(head.weight * 0 + 0.1, torch.tensor([0.0, 0.0, 3.0]).double())
    x, labels = gaussians.sample(100, torch.Generator().manual_seed(5))
    balanced = rebalanced(tilted, gaussians, Rebalancing(rate=0.05))
    share = [float((each(x).argmax(1) == labels).double().mean()) for each in (tilted, balanced)]
    assert share[0] < 0.34 and share[1] > 0.8, share
    assert torch.equal(balanced.weight, rebalanced(tilted, gaussians, Rebalancing(rate=0.05)).weight)


def test_a_class_without_an_output_is_refused() -> None:
    head, gaussians = some()
    with pytest.raises(ValueError, match="a Gaussian of class 2, but 2 outputs"):
        rebalanced(LinearHead(head.weight[:2], head.bias[:2]), gaussians)
