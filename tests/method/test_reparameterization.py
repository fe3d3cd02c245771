"""The residual MLP through which prompts train."""

import pytest
import torch

from qtuning_fast.method.reparameterization import ResidualReparameterization


def test_reparameterization_starts_as_the_identity() -> None:
    mlp = ResidualReparameterization(16)
    rows = torch.randn(2, 3, 16)
    assert torch.equal(mlp(rows), rows)
    mlp(rows).sum().backward()
    assert mlp.up.weight.grad is not None and mlp.up.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("features", "hidden"), [(16, 8), (1, 1)])
def test_the_hidden_layer_has_half_the_features(features: int, hidden: int) -> None:
    mlp = ResidualReparameterization(features)
    assert mlp.down.weight.shape == (hidden, features) and mlp.up.weight.shape == (features, hidden)
    torch.nn.init.ones_(mlp.up.weight)
    rows = torch.randn(5, features)
    expected = rows + torch.relu(mlp.down(rows)).sum(1, keepdim=True)
    torch.testing.assert_close(mlp(rows), expected)
