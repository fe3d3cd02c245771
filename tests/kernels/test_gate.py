"""The gate as a device function, each activation and its derivatives, against float64."""

import pytest
import torch
import triton
import triton.language as tl

from qtuning_fast.attention.common import GATES
from qtuning_fast.kernels.gate import gated, gated_with_derivatives

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def gate_kernel(s, results, size, alpha, tau, GATE: tl.constexpr, FAST_TANH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(s + i)
    g, by_s, by_alpha, by_tau = gated_with_derivatives(x, alpha, tau, GATE, FAST_TANH)
    tl.store(results + i, g)
    tl.store(results + size + i, by_s)
    tl.store(results + 2 * size + i, by_alpha)
    tl.store(results + 3 * size + i, by_tau)
    tl.store(results + 4 * size + i, gated(x, alpha, tau, GATE, FAST_TANH))


def derivatives(name, s, alpha, tau, fast_tanh=False):
    """g, dg/ds, dg/dα, dg/dτ and g again: of the kernel, and in float64 for the same float32 arguments."""
    results = torch.full((5, len(s)), torch.nan, device=DEVICE)
    gate_kernel[(1,)](s.to(DEVICE), results, len(s), alpha, tau, name or "none", fast_tanh, len(s))
    return results.cpu().double(), by_autograd(name, s, alpha, tau, torch.float64)


def by_autograd(name, s, alpha, tau, dtype):
    leaves = [torch.full_like(s, x).to(dtype).requires_grad_() for x in (0.0, alpha, tau)]
    x, a, t = leaves
    scores = s + x
    g = scores + 0 * (a + t) if name is None else scores + a * GATES[name](t * scores)
    return torch.stack([g, *torch.autograd.grad(g.sum(), leaves), g]).detach().double()


@pytest.mark.parametrize("name", [*GATES, None])
@pytest.mark.parametrize(("alpha", "tau"), [(1.0, 1.0), (0.7, -1.3), (-2.0, 0.1), (0.0, 3.0)])
def test_values_and_derivatives(name, alpha, tau):
    s = torch.linspace(-12, 12, 1024)
    found, exact = derivatives(name, s, alpha, tau)
    plain = by_autograd(name, s, alpha, tau, torch.float32)
    for row, want, other in zip(found, exact, plain):
        assert (row - want).abs().max() <= 2 * (other - want).abs().max() + 2e-7


@pytest.mark.parametrize("name", [*GATES, None])
def test_large_scores_stay_finite(name):
    s = torch.cat([torch.linspace(-1e4, 1e4, 256), torch.linspace(-120, 120, 256)])
    found, exact = derivatives(name, s, 1.0, 1.0)
    assert found.isfinite().all()
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
def test_the_hardware_tanh_is_as_exact_as_its_manual_says():
    """The promise of the log-sum-exp rests on it: docs/kernels.md, "How exact"."""
    s = torch.cat([torch.linspace(-12, 12, 960), torch.logspace(-30, 2, 64)])
    found, exact = (results[2] for results in derivatives("tanh", s, 1.0, 1.0, fast_tanh=True))  # dg/dα = tanh
    assert ((found - exact).abs() <= 2.0**-11 * (1 + 1e-3) * exact.abs()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softplus"])
def test_the_hardware_tanh_keeps_what_16_bits_hold(name):
    s = torch.linspace(-12, 12, 1024)
    found, exact = derivatives(name, s, 1.0, 1.0, fast_tanh=True)
    relative = ((found - exact).abs() / (1 + s.abs())).max(dim=1).values
    assert (relative < torch.finfo(torch.float16).eps * 1.5).all(), relative
