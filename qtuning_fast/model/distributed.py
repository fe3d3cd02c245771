"""Training of one model by several processes: they share random draws, split batches, and gather what they find."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")


class ProcessLostError(ConnectionError):
    """Another process of the same training has ended, or has not answered within the group's timeout."""


def process_count() -> int:
    """Return the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Return the rank of this process, from 0; 0 without a process group."""
    return dist.get_rank() if process_count() > 1 else 0


@contextmanager
def _answered() -> Iterator[None]:
    """Say which process a call to all of them has missed; backends name sockets, and each in its own words."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = re.sub(r"^\[\S*\]\s*", "", str(error).strip().splitlines()[0])  # without a place in the backend's source
        raise ProcessLostError(
            f"process {process_number()} of {process_count()} has lost another one, which has ended or does not answer "
            f"({said})"
        ) from error


@torch.no_grad()
def synchronize(tensors: Sequence[Tensor]) -> None:
    """Overwrite these tensors with the first process's values; do nothing in a single process."""
    if process_count() == 1:
        return
    first = [[tensor.cpu() for tensor in tensors]]
    with _answered():
        dist.broadcast_object_list(first)  # a few megabytes a task, and independent of the tensors' device
    for tensor, value in zip(tensors, first[0]):
        tensor.copy_(value)


def gathered(value: Value) -> list[Value]:
    """Return the values of all processes, in the order of their ranks, in a call that all processes must make."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    with _answered():
        dist.all_gather_object(values, value)
    return values


def gathered_from(compute: Callable[[], Value]) -> list[Value]:
    """Return what a function returns in all processes; where it raises in one of them, raise its error in all."""
    processes = gathered(_attempted(compute))
    for _, theirs in processes:
        if theirs is not None:
            raise theirs
    return [cast(Value, each) for each, _ in processes]


def from_first(compute: Callable[[], Value]) -> Value:
    """Return in all processes what a function returns in the first, where alone it is called; so with its error."""
    if process_count() == 1:
        return compute()
    told: list[Any] = [_attempted(compute) if process_number() == 0 else None]
    with _answered():
        dist.broadcast_object_list(told)
    value, error = told[0]
    if error is not None:
        raise error
    return cast(Value, value)


def _attempted(compute: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    """Return what a function returns, or its error: the other processes must not wait for one that has raised."""
    try:
        return compute(), None
    except Exception as error:
        return None, error


def share_of(size: int) -> slice:
    """Return the places of this process's part of a batch of this size; parts differ by one, and may be empty."""
    each, more = divmod(size, process_count())
    first = process_number() * each + min(process_number(), more)
    return slice(first, first + each + (process_number() < more))


def dealt_in_turn(count: int, compute: Callable[[int], Value]) -> list[Value]:
    """Return what a function returns for 0 to count - 1; each process calls it for every so-manieth number only."""
    processes = gathered_from(lambda: [compute(n) for n in range(process_number(), count, process_count())])
    return [processes[n % process_count()][n // process_count()] for n in range(count)]


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], *values: Tensor) -> list[Tensor]:
    """Replace the gradients of parameters by their sums over all processes.

    A parameter has no gradient afterwards if it had one nowhere. All processes get the same bits, whatever the backend:
    each adds up the parts itself, in the order of ranks.

    Args:
        parameters: on one device, the same in all processes.
        *values: scalars on that device, to sum beside.

    Returns:
        The sums of `values`.
    """
    trained = list(parameters)
    exact = any(each.dtype == torch.float64 for each in trained)
    parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
    has = torch.tensor([each.grad is not None for each in trained], device=values[0].device)
    mine = torch.cat([x.reshape(-1).to(torch.float64 if exact else torch.float32) for x in (has, *values, *parts)])
    every = [torch.empty_like(mine) for _ in range(process_count())]
    with _answered():
        dist.all_gather(every, mine)
    total = every[0]
    for other in every[1:]:
        total += other
    found = total[: len(trained)].tolist()
    places = len(trained)
    sums = [total[places + n].to(value.dtype) for n, value in enumerate(values)]
    places += len(values)
    for parameter, count in zip(trained, found):
        gradient = total[places : places + parameter.numel()].view_as(parameter).to(parameter.dtype)
        parameter.grad = gradient if count else None
        places += parameter.numel()
    return sums


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor (FSDP2), in a call that all processes must make; return any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
