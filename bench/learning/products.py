"""Products of a frozen model's float32 matrices by oneDNN.

On an AMD CPU with AVX-512, PyTorch's own choice (MKL) takes more than twice as long. PyTorch gives products to oneDNN
where it may round to bfloat16, and oneDNN rounds only on CPUs with AMX, so on others this changes the order of sums
alone. It is switched on around the large products of linear layers; the small ones of attention are faster without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def onednn() -> Iterator[None]:
    """Within this context oneDNN computes products, and may round to bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def onednn_rounds() -> bool:
    """Return whether oneDNN rounds to bfloat16 on this CPU where it may."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ x.double()
    with onednn():
        return bool((x @ x - exact).abs().max() > 1e-5 * exact.abs().max())


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        with onednn():
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        with onednn():
            return grads[0] @ ctx.saved_tensors[0], None, None


class FrozenLinear(nn.Linear):
    """A linear layer that does not train, with oneDNN's products."""

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenProduct.apply(x, self.weight, self.bias)


def use_onednn(model: nn.Module) -> bool:
    """Freeze a model's linear layers and give their products to oneDNN, unless it would round.

    Returns:
        Whether oneDNN has them.
    """
    if onednn_rounds():
        return False
    for module in model.modules():
        if type(module) is nn.Linear:
            module.requires_grad_(False)
            module.__class__ = FrozenLinear
    return True
