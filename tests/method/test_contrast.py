"""The contrastive regulariser: its formula, its gradient, and which way it moves features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtuning_fast.method.contrast import TEMPERATURE, contrastive_loss


@pytest.mark.parametrize(("batch", "means"), [(1, 0), (5, 0), (1, 3), (4, 6)])
def test_the_formula(batch: int, means: int) -> None:
    draw = torch.Generator().manual_seed(0)
    h, mu = (torch.randn(n, 3, generator=draw, dtype=torch.float64) for n in (batch, means))
    rows = np.concatenate([mu.numpy(), h.numpy()])
    alike = np.exp(rows @ rows.T / TEMPERATURE)
    expected = -np.mean(np.log(np.diag(alike) / alike.sum(1)))
    assert float(contrastive_loss(h, mu)) == pytest.approx(expected, abs=1e-12)
    h.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(x, mu), h)


def test_features_move_away_from_earlier_classes() -> None:
    mu = torch.tensor([[1.0, 0.0]], requires_grad=True)
    h = torch.tensor([[0.9, 0.1], [0.8, -0.3]], requires_grad=True)
    contrastive_loss(h, mu).backward()
    assert mu.grad is None and h.grad is not None
    moved = (h - 0.1 * h.grad).detach()
    assert (moved @ mu.detach().mT).sum() < (h @ mu.mT).sum()
