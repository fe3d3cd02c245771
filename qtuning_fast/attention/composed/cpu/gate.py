"""The gate's σ(τ s) and its derivative by PyTorch's elementwise operators, written into given memory."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten

_MINUS_ONE = {dtype: torch.tensor(-1.0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
_OVERWRITE = {  # overwrites x with σ(x)
    "sigmoid": torch.sigmoid_,
    "gelu": lambda x: aten.gelu.out(x, out=x),
    "relu": torch.relu_,
    "softplus": lambda x: aten.softplus.out(x, 1, 40, out=x),
    "elu": lambda x: aten.elu.out(x, out=x),
    "identity": lambda x: x,
}
_FROM_SIGMA = {  # d, σ(x) -> d · σ'(x)
    "tanh": lambda d, y, out: aten.tanh_backward.grad_input(d, y, grad_input=out),
    "sigmoid": lambda d, y, out: aten.sigmoid_backward.grad_input(d, y, grad_input=out),
    "relu": lambda d, y, out: aten.threshold_backward.grad_input(d, y, 0, grad_input=out),
    "identity": lambda d, y, out: d,
}
_FROM_X = {  # d, x -> d · σ'(x); overwrites x
    "gelu": lambda d, x: aten.gelu_backward.grad_input(d, x, grad_input=x),
    "softplus": lambda d, x: aten.softplus_backward.grad_input(d, x, 1, 40, grad_input=x),
    "elu": lambda d, x: aten.elu_backward.grad_input(d, 1, 1, 1, False, x, grad_input=x),
}


def sigma(gate: str, s: Tensor, tau: Tensor, out: Tensor) -> Tensor:
    """Write σ(τ s) to `out`.

    tanh(x) is computed as 2 sigmoid(2x) - 1: PyTorch's sigmoid takes a sixth of the time of its tanh, and a score needs
    only absolute accuracy.
    """
    if gate == "tanh":
        torch.mul(s, 2 * tau, out=out).sigmoid_()
        return torch.add(_MINUS_ONE[out.dtype], out, alpha=2, out=out)
    return _OVERWRITE[gate](torch.mul(s, tau, out=out))


def times_slope(gate: str, d: Tensor, s: Tensor, tau: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Return d · σ'(τ s), given y = σ(τ s), in `out` or in d itself."""
    if gate in _FROM_SIGMA:
        return _FROM_SIGMA[gate](d, y, out)
    return _FROM_X[gate](d, torch.mul(s, tau, out=out))
