"""The gate by PyTorch's elementwise operators: each activation and its slope, in memory that is given."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.attention.common import GATES
from qtuning_fast.attention.composed.cpu.gate import sigma, times_slope


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_slopes_are_those_of_autograd(name, dtype):
    s = torch.linspace(-30, 30, 601, dtype=dtype)
    tau, d = torch.tensor(-0.7, dtype=dtype), torch.linspace(1, 2, 601, dtype=dtype)
    x = (tau.double() * s.double()).requires_grad_()
    exact = GATES[name](x)
    (slope,) = torch.autograd.grad(exact, x, d.double())
    room = torch.empty_like(s)
    y = sigma(name, s, tau, out=room)
    assert y is room
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact.detach(), rtol=tolerance, atol=tolerance)
    found = times_slope(name, d.clone(), s, tau, y, out=torch.empty_like(s))
    torch.testing.assert_close(found.double(), slope, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("name", GATES)
def test_scores_are_only_read(name):
    s = torch.linspace(-3, 3, 7)
    before, tau = s.clone(), torch.tensor(1.5)
    y = sigma(name, s, tau, out=torch.empty_like(s))
    times_slope(name, torch.ones(7), s, tau, y, out=torch.empty_like(s))
    assert torch.equal(s, before)
