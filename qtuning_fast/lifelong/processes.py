"""Several processes of one run, as torchrun and accelerate start them.

A run in several processes gives the metrics of one. Each process runs the whole of it and computes its share of each
batch (`split_batches`, `evaluation`). The first one alone reads and writes the run's folder and shows progress; the
others work in a folder of their own that is removed, so nothing has to be shared but the data and the base model.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from qtuning_fast.lifelong.run_folder import RUN_FILE
from qtuning_fast.model.distributed import from_first, gathered, process_count, process_number

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: as long as one of them may load data that the others have.

A process that has died is noticed at once, because its connections close. This bounds the wait for one that hangs.
"""

_FOLLOWING = timedelta(seconds=3)  # how long after one process another one may meet the same error
_COPIES, _LOCK = "qtuning-process-", ".lock"
_OLD = 3600.0  # seconds
_GOES_ON_FROM = (RUN_FILE, "adapter", "tasks")
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
_REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_MIXED_PRECISION": "mixed precision",
    "ACCELERATE_DYNAMO_BACKEND": "compilation",
}


def launched_count() -> int:
    """Return how many processes a launcher has started that have not joined; 1 without a launcher.

    Raises:
        ValueError: the launcher's variable is no number.
    """
    return _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"{name} is {text!r} in the environment, where a launcher puts a number; unset it")
    return int(text)


def check_joined() -> None:
    """Raise a ValueError if a launcher started several processes and this one has not joined them."""
    if launched_count() > 1:
        raise ValueError(
            f"a launcher has started {launched_count()} processes; run within qtuning_fast.lifelong.joined()"
        )


@dataclass
class _Meeting:
    """Where processes tell each other of errors; unlike a collective call it waits for no process that goes on."""

    store: dist.Store | None = None


_meeting = _Meeting()


@contextmanager
def joined() -> Iterator[None]:
    """Within the block, be one of the processes that torchrun or accelerate has started; without a launcher do nothing.

    The command line does this by itself; a script calls it before it loads a base model, and runs a `LifelongTrainer`
    within. On GPUs each process sees its own alone, the one of its `LOCAL_RANK`, and NCCL sums gradients; on CPUs gloo
    does. Ctrl-C interrupts a process once. The launcher's variables are hidden, as libraries that find them, such as
    transformers' Trainer, would split batches once more.

    Raises:
        ValueError: the launcher is one that a run cannot work with.
        OSError: the processes do not find each other.
    """
    started = launched_count()
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    for name, what in _REFUSED.items():
        if os.environ.get(name, "no").lower() not in ("no", "false", "0"):
            raise ValueError(
                f"accelerate is configured for {what}, but a run splits batches alone, in the precision of the model; "
                "start it with torchrun"
            )
    mine = started > 1 and not dist.is_initialized()
    if mine:
        _join(started)
    hidden = {name: os.environ.pop(name) for name in _LAUNCHERS if name in os.environ}
    try:
        with _one_interrupt():
            yield
    finally:
        os.environ.update(hidden)
    if mine:  # not after an error, when others may never come to this
        _meeting.store = None
        dist.destroy_process_group()


def _join(started: int) -> None:
    backend = "gloo"
    if torch.cuda.device_count():  # is_available would fix which GPUs this process sees
        _see_own_gpu(_number("LOCAL_RANK", 0))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(
            backend, store=dist.PrefixStore("run", store), rank=rank, world_size=started, timeout=TIMEOUT
        )
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0]
        raise ConnectionError(f"the {started} processes that were started do not find each other ({said})") from error
    _meeting.store = dist.PrefixStore("errors", store)


def _see_own_gpu(local: int) -> None:
    """Hide the GPUs of other processes: libraries take the first one that they see."""
    count = torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"there are {count} GPUs here, but a process for GPU {local} was started; start {count} a node"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local].strip()
    torch.cuda.init()
    if torch.cuda.device_count() != 1:
        raise ValueError("CUDA was in use before the processes joined; join them first")


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Interrupt once: a terminal sends Ctrl-C to all processes, and a launcher sends it to them again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def show_once(message: str, show: Callable[[str], None]) -> None:
    """Show an error that this process ends with, once for all processes that end with it.

    The first process shows its own. Another one shows what the first does not: then it is an error of its own.
    """
    me, store = process_number(), _meeting.store
    if me == 0:
        show(message)
    if store is None:
        return
    try:
        if me:
            store.wait(["0"], _FOLLOWING)
            if store.get("0").decode() != message:
                show(f"process {me}: {message}")
        store.set(str(me), message)
        if me == 0:  # it may be this process that keeps the store
            store.wait([str(n) for n in range(process_count())], _FOLLOWING)
    except RuntimeError:
        if me:
            show(f"process {me}: {message}")


def leave(status: int) -> None:
    """End this process at once if others run beside it: to leave their group in order, it would wait for them."""
    if process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def agree(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError in all processes if one of them has another setting than the first process.

    Args:
        settings: by name.
    """
    first, *others = gathered(dict(settings))
    for number, theirs in enumerate(others, 1):
        for name in first | theirs:
            if first.get(name) != theirs.get(name):
                raise ValueError(
                    f"{name} is {theirs.get(name)!r} in process {number}, but {first.get(name)!r} in process 0; all "
                    "processes must have the same"
                )


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Yield the folder itself in the first process; in the others a copy, which is removed after the block."""
    if process_count() == 1:
        yield folder
        return
    _remove_abandoned()
    with (
        tempfile.TemporaryDirectory(prefix=_COPIES, ignore_cleanup_errors=True) as copy,
        FileLock(Path(copy) / _LOCK),
    ):
        for name in from_first(lambda: _files(folder)):
            content = from_first((folder / name).read_bytes)
            if process_number():
                (Path(copy) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(copy) / name).write_bytes(content)
        yield Path(copy) if process_number() else folder


def _remove_abandoned() -> None:
    """Remove the copies of processes that were killed."""
    for copy in Path(tempfile.gettempdir()).glob(f"{_COPIES}*"):
        with suppress(OSError, Timeout):
            if time.time() - copy.stat().st_mtime > _OLD:  # a new one may not be locked yet
                with FileLock(copy / _LOCK, timeout=0):
                    shutil.rmtree(copy, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    """Return the files of a run that it goes on from; hidden ones are locks, or not written in full."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [str(path) for path in found if path.parts[0] in _GOES_ON_FROM and not path.name.startswith(".")]
