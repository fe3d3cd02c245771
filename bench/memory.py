"""How much memory a piece of work takes at the most beyond what is held before it.

On a GPU it is what PyTorch's allocator has handed out. On a CPU it is by how much the process grew, which counts
whatever is taken, by whomever; so there it is measured in a process of its own, and on Linux only.
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

# What a score takes at the most in a training step of who computes them all: float32 several times over, and 16 bits.
BYTES_A_SCORE = {"eager": 24, "eager-compiled": 14, "reference": 32}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(shape: Shape, peer: str, device: str, dtype: torch.dtype) -> int | None:
    """Bytes of a peer's step, or forward pass; None where there is no way to know. On a CPU in a fresh process."""
    with torch.set_grad_enabled(shape.trained):
        work = _prepared(shape, peer, device, dtype)
        first = work
        if device == "cpu":
            small = replace(shape, B=min(shape.B, shape.tasks), Hq=shape.Hq // shape.Hkv, Hkv=1, N=16, context=16, P=11)
            first = _prepared(small, peer, device, dtype)  # a process that has grown stays so
        first()  # what is loaded and set up once is not the shape's
        return peak_of(work, torch.device(device))


def too_large(shape: Shape, peer: str, device: str, dtype: torch.dtype) -> str:
    """Why a peer is not even tried: its scores alone would not fit into the GPU's memory. Empty: it may."""
    if torch.device(device).type != "cuda" or peer not in BYTES_A_SCORE:
        return ""
    needed = shape.B * shape.Hq * shape.N * (shape.P + shape.M) * BYTES_A_SCORE[peer] * dtype.itemsize // 2
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return f"not tried: it takes about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free" if needed > free else ""


def peak_of(work: Callable[[], object], gpu: torch.device) -> int | None:
    """Bytes that a piece of work takes; None where there is no way to know."""
    if gpu.type != "cuda" and not CLEAR.exists():
        return None
    gc.collect()
    before = _held(gpu)
    work()
    return max(_most(gpu) - before, 0)


def resident_bytes() -> int | None:
    """What the process holds of the host's memory now; None where there is no way to know."""
    return _status("VmRSS") if STATUS.exists() else None


def _prepared(shape: Shape, peer: str, device: str, dtype: torch.dtype) -> Callable[[], object]:
    x = shapes.inputs(shape, dtype=dtype, device=device)
    prepared = prepare(PEERS[peer], shape, x, training=shape.trained)
    return partial(prepared.step, x.d_output) if shape.trained else prepared.forward


def _held(gpu: torch.device) -> int:
    """What is held now; from here on the peak counts."""
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
