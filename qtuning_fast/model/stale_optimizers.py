"""Optimizers of finished tasks: each task trains new parameters, which an optimizer made before does not hold.

A Trainer keeps its optimizer from one `train` to the next, and would train nothing of the next task without a word.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

Check = Callable[[set[int]], None]
"""Takes the ids of the parameters that an optimizer holds, and raises an error if some are missing."""

_FINISHED = WeakIdKeyDictionary()  # for each parameter of a finished task that somebody still holds, its model's check


def watch(parameters: Iterable[nn.Parameter], check: Check) -> None:
    """Call `check`, a method, before each step of an optimizer that holds one of these parameters."""
    for parameter in parameters:
        _FINISHED[parameter] = weakref.WeakMethod(check)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not len(_FINISHED):
        return
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for check in {_FINISHED[parameter]() for parameter in held if parameter in _FINISHED}:
        if check is not None:  # the model still exists
            check({id(parameter) for parameter in held})


register_optimizer_step_pre_hook(_before_step)
