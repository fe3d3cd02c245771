"""The cap on scores as a device function, against float64."""

import pytest
import torch
import triton
import triton.language as tl

from qtuning_fast.kernels.arguments import Scaling
from qtuning_fast.kernels.scaling import scaled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def scaling_kernel(products, results, size, scaling, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    s, slope = scaled(tl.load(products + i), scaling)
    tl.store(results + i, s)
    tl.store(results + size + i, tl.zeros([BLOCK], tl.float32) + slope)


def computed(products, factor, cap):
    """The scores and the cap's derivatives, by the kernel and in float64."""
    results = torch.full((2, len(products)), torch.nan, device=DEVICE)
    scaling_kernel[(1,)](products.to(DEVICE), results, len(products), Scaling(factor, cap), len(products))
    s = (products.double() * factor).requires_grad_()
    capped = s * 1.0 if cap is None else cap * torch.tanh(s / cap)
    slope = torch.autograd.grad(capped.sum(), s)[0]
    return results.cpu().double(), torch.stack([capped.detach(), slope])


@pytest.mark.parametrize("cap", [None, 0.1, 1.0, 30.0, 50.0, 1e30])
@pytest.mark.parametrize("factor", [0.125, 3.0])
def test_scores_and_derivatives(factor, cap):
    products = torch.cat([torch.linspace(-200, 200, 768), torch.logspace(-20, 2, 128), -torch.logspace(-20, 2, 128)])
    found, exact = computed(products, factor, cap)
    float32 = torch.finfo(torch.float32)
    vanishing = 0.0 if cap is None else cap * float32.tiny  # s / cap is 0 below it
    assert ((found[0] - exact[0]).abs() <= 3 * float32.eps * exact[0].abs() + vanishing).all()
    assert ((found[1] - exact[1]).abs() <= 3 * float32.eps).all()


def test_the_largest_products_reach_the_cap_and_no_nan():
    products = torch.tensor([3e38, -3e38, torch.inf, -torch.inf] * 4)
    found, _ = computed(products, 1.0, 1e-30)
    torch.testing.assert_close(found[0], 1e-30 * products.sign().double(), rtol=1e-6, atol=0)
    assert (found[1] == 0).all()
