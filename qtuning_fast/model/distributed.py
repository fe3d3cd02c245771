"""Training of one model by several processes: they share random draws and gather shards and statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


@torch.no_grad()
def synchronize(tensors: Sequence[Tensor]) -> None:
    """Overwrite these tensors with the first process's values; do nothing in a single process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    first = [[tensor.cpu() for tensor in tensors]]
    dist.broadcast_object_list(first)  # a few megabytes a task, and independent of the tensors' device
    for tensor, value in zip(tensors, first[0]):
        tensor.copy_(value)


def gathered(value: Value) -> list[Value]:
    """Return the values of all processes, in the order of their ranks, in a call that all processes must make."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_from(compute: Callable[[], Value]) -> list[Value]:
    """Return what a function returns in all processes; where it raises in one of them, raise its error in all."""
    value: Value | None = None
    error: Exception | None = None
    try:
        value = compute()
    except Exception as found:  # the other processes must not wait for this one
        error = found
    processes = gathered((value, error))
    for _, theirs in processes:
        if theirs is not None:
            raise theirs
    return [cast(Value, each) for each, _ in processes]


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (FSDP2), in a call that all processes must make; return any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
