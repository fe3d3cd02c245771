"""What the backends share: the gates, the rule for masks, precision, and what `torch.compile` is told."""

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
    # PyTorch's default threshold of 20 cuts off 2e-9, which float64 sees; 40 cuts off 4e-18, and exp(40) is finite.
    "softplus": lambda s: F.softplus(s, threshold=40.0),
    "elu": F.elu,
    "identity": lambda s: s,
}


def score_dtype(query: Tensor) -> torch.dtype:
    """In which scores, gate and softmax are computed."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores under a mask, bool (True: attend) or additive (the dtype's most negative finite number means -inf)."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf).to(scores.dtype)


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Under autocast scores would be 16-bit. Meta tensors, on which only shapes are computed, know no autocast."""
    device = x.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else nullcontext()


def constant(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Marks a function whose result never changes in a process: it is called while tracing, and not looked into.

    What torch.compiler.assume_constant_result does, without importing the compiler, and Triton, for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
