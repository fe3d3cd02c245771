"""The most memory that a piece of work takes beyond what was held before it.

On a GPU it is what PyTorch's allocator has handed out. On a CPU it is the growth of the process, which includes every
allocation; so it is measured in a process of its own, and on Linux only.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from qtuning_fast.bench import shapes
from qtuning_fast.bench.accuracy import prepare
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.shapes import Shape

# The most bytes of a score in a training step of a peer that computes all scores: float32 several times, and 16 bits.
BYTES_A_SCORE = {"eager": 24, "eager-compiled": 14, "reference": 32}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(shape: Shape, peer: str, device: str, dtype: torch.dtype) -> int | None:
    """Bytes of a peer's step, or forward pass; None: not known. On a CPU, call it in a fresh process."""
    with torch.set_grad_enabled(shape.trained):
        work = _prepared(shape, peer, device, dtype)
        first = work
        if device == "cpu":
            small = replace(shape, B=min(shape.B, shape.tasks), Hq=shape.Hq // shape.Hkv, Hkv=1, N=16, context=16, P=11)
            first = _prepared(small, peer, device, dtype)  # a process that has grown stays so
        first()  # what is loaded and set up once does not count
        return peak_of(work, torch.device(device))


def too_large(shape: Shape, peer: str, device: str, dtype: torch.dtype) -> str:
    """Why a peer is not tried: its scores alone would not fit into the GPU's memory. Empty: they fit."""
    if torch.device(device).type != "cuda" or peer not in BYTES_A_SCORE:
        return ""
    needed = shape.rows * shape.Hq * (shape.P + shape.M) * BYTES_A_SCORE[peer] * dtype.itemsize // 2
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return f"not tried: it takes about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free" if needed > free else ""


def peak_of(work: Callable[[], object], gpu: torch.device) -> int | None:
    """Bytes that a piece of work takes; None: not known."""
    if gpu.type != "cuda" and not CLEAR.exists():
        return None
    gc.collect()
    before = _held(gpu)
    work()
    return max(_most(gpu) - before, 0)


def resident_bytes() -> int | None:
    """Bytes of the host's memory that the process holds now; None: not known."""
    return _status("VmRSS") if STATUS.exists() else None


def _prepared(shape: Shape, peer: str, device: str, dtype: torch.dtype) -> Callable[[], object]:
    x = shapes.inputs(shape, dtype=dtype, device=device)
    prepared = prepare(PEERS[peer], shape, x, training=shape.trained)
    return partial(prepared.step, x.d_output) if shape.trained else prepared.forward


def _held(gpu: torch.device) -> int:
    """Bytes that are held now; resets the peak."""
    if gpu.type == "cuda":
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        return torch.cuda.memory_allocated(gpu)
    CLEAR.write_text("5")  # resets VmHWM
    return _status("VmRSS")


def _most(gpu: torch.device) -> int:
    if gpu.type == "cuda":
        torch.cuda.synchronize(gpu)
        return torch.cuda.max_memory_allocated(gpu)
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
