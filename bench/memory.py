"""How much memory a training step of a peer takes beyond its inputs, at the most.

On a GPU it is what PyTorch's allocator has handed out. On a CPU it is by how much the process grew, which counts
whatever is taken, by whomever; so there it is measured in a process of its own, and on Linux only.
"""

import gc
from pathlib import Path

import torch

from qtuning_fast.bench import shapes
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.shapes import TINY, Shape

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def step_peak(shape: Shape, peer: str, device: str) -> int | None:
    """Bytes; None where there is no way to know. On a CPU to be called in a fresh process."""
    gpu = torch.device(device)
    if gpu.type != "cuda" and not CLEAR.exists():
        return None
    dtype = torch.bfloat16 if gpu.type == "cuda" else torch.float32
    step = _prepare(TINY, peer, dtype, device)
    step()  # what is loaded and set up once is not the shape's
    step = _prepare(shape, peer, dtype, device)
    gc.collect()
    before = _held(gpu)
    step()
    return max(_peak(gpu) - before, 0)


def resident_bytes() -> int | None:
    """What the process holds of the host's memory now; None where there is no way to know."""
    return _status("VmRSS") if STATUS.exists() else None


def _prepare(shape: Shape, peer: str, dtype: torch.dtype, device: str):
    x = shapes.inputs(shape, dtype=dtype, device=device).tracked()
    prepared = PEERS[peer].prepare(shape, x)
    return lambda: prepared.step(x.d_output)


def _held(gpu: torch.device) -> int:
    """What is held now; from here on the peak counts."""
    if gpu.type == "cuda":
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        return torch.cuda.memory_allocated(gpu)
    CLEAR.write_text("5")  # resets VmHWM
    return _status("VmRSS")


def _peak(gpu: torch.device) -> int:
    if gpu.type == "cuda":
        torch.cuda.synchronize(gpu)
        return torch.cuda.max_memory_allocated(gpu)
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
