"""Code that backends share: gates, masks, precision, and hints for `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Args = ParamSpec("Args")
Result = TypeVar("Result")

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "relu": torch.relu,
    # PyTorch's default threshold of 20 drops 2e-9, which float64 resolves; 40 drops 4e-18, and exp(40) is finite.
    "softplus": lambda s: F.softplus(s, threshold=40.0),
    "elu": F.elu,
    "identity": lambda s: s,
}


def score_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype of scores, gate and softmax."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Apply a mask to scores: bool (True: attend) or additive (the dtype's most negative finite number means -inf)."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf).to(scores.dtype)


def constant(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Mark a function as constant within a process: the compiler calls it while tracing, but does not trace it.

    This equals torch.compiler.assume_constant_result without importing the compiler and Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _knows_autocast(device: str) -> bool:
    """Return whether a kind of device has autocast; meta has none. A constant, for PyTorch 2.11 cannot trace it."""
    return torch.amp.is_autocast_available(device)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off, under which scores would be computed in 16 bits."""
    device = x.device.type
    is_on = _knows_autocast(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()
