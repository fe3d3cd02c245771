"""The roofline: the least time of a shape, from its counted work and what the device can do.

Matrix products are counted as if every score were computed once a pass: 2 products forward (q kᵀ, p v), 5 backward
(q kᵀ once more, dO vᵀ, dq, dk, dv), over the pairs of query and key that causality leaves. Each input of a pass is read
once and each result written once. A pair takes one exponential, a pair with a prefix row also a tanh.

    python -m qtuning_fast.bench.rows.roofline --out FILE       measures the ceilings, for all later steps of a plan
"""

import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qtuning_fast.bench.rows.command import Command
from qtuning_fast.bench.shapes import Shape
from qtuning_fast.bench.timing import compare

SPECIAL_A_CLOCK = 16  # exponentials or tanh a multiprocessor, on NVIDIA's architectures 8 and 9


@dataclass(frozen=True)
class Ceilings:
    """The most that the device does; measured, except for the special functions."""

    flops: float  # of matrix products, a second: 16-bit ones on a GPU, float32 on a CPU
    copied: float  # bytes a second, read plus written
    read: float  # bytes a second, where nothing is written
    special: float  # exponentials a second, by the data sheet's clock; 0: unknown

    @property
    def bytes(self) -> float:
        """Bytes a second, copied or read, whichever is faster."""
        return max(self.copied, self.read)

    def __str__(self) -> str:
        rates = f"copying {self.copied / 1e12:.3f} TB/s, reading {self.read / 1e12:.3f} TB/s"
        return f"{self.flops / 1e12:.2f} TFLOP/s, {rates}"


@dataclass(frozen=True)
class Work:
    """The counted work of a pass."""

    flops: int
    bytes: int
    special: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.special + other.special)

    def least_ms(self, ceilings: Ceilings) -> tuple[float, str]:
        """The least milliseconds, and what bounds them."""
        seconds = {"products": self.flops / ceilings.flops, "bytes": self.bytes / ceilings.bytes}
        if ceilings.special:
            seconds["special functions"] = self.special / ceilings.special
        limit = max(seconds, key=lambda name: seconds[name])
        return seconds[limit] * 1e3, limit


def forward_work(shape: Shape, element_size: int = 2) -> Work:
    context_pairs, prefix_pairs = _context_pairs(shape), shape.rows * shape.P
    queries = shape.Hq * shape.rows
    read = (queries + 2 * _seen(shape)) * shape.D * element_size + _parameter_bytes(shape, element_size)
    written = queries * (shape.D * element_size + 4)  # the output and a float32 log-sum-exp
    capped = shape.softcap is not None
    return Work(
        flops=4 * shape.Hq * (context_pairs + prefix_pairs) * shape.D,
        bytes=read + written,
        special=shape.Hq * ((1 + capped) * context_pairs + (2 + capped) * prefix_pairs),
    )


def backward_work(shape: Shape, element_size: int = 2) -> Work:
    forward = forward_work(shape, element_size)
    queries, keys = shape.Hq * shape.rows, shape.Hkv * (shape.rows if shape.packed else shape.B * shape.M)
    read = (3 * queries + 2 * _seen(shape)) * shape.D * element_size + queries * 4  # also o, dO and lse
    read += _parameter_bytes(shape, element_size)
    written = (queries + 2 * keys) * shape.D * element_size + _prefix_bytes(shape, element_size)
    return Work(flops=forward.flops * 5 // 2, bytes=read + written, special=forward.special)


def _context_pairs(shape: Shape) -> int:
    """Pairs of a query and a key that it sees, in one head of all samples."""
    before, after = shape.window or (None, None)
    after = 0 if shape.is_causal else after
    if shape.packed:
        return sum(_pairs(length, length, before, after) for length in shape.lengths)
    if before is None and after is None:
        return shape.N * sum(shape.lengths)
    return shape.B * _pairs(shape.N, shape.M, before, after)


def _pairs(N: int, M: int, before: int | None, after: int | None) -> int:
    """Pairs of a query and a key at most so far before and after its position."""
    positions = range(M - N, M)
    first = (0 if before is None else max(i - before, 0) for i in positions)
    last = (M if after is None else min(i + after + 1, M) for i in positions)
    return sum(max(end - start, 0) for start, end in zip(first, last))


def _prefix_bytes(shape: Shape, element_size: int) -> int:
    """Bytes of all prefixes: rows, alpha and tau; in training float32, with U and V of keys and values."""
    rows, gate = 2 * shape.Hkv * shape.P * shape.D, 2 * shape.Hq
    reweighting = 2 * (shape.P + shape.Hkv * shape.D)
    return shape.tasks * (4 * (rows + gate + reweighting) if shape.trained else element_size * (rows + gate))


def _parameter_bytes(shape: Shape, element_size: int) -> int:
    """Bytes of what samples share: prefixes and a bias."""
    bias = shape.Hq * shape.N * shape.M if shape.bias else 0
    return _prefix_bytes(shape, element_size) + bias * element_size


def _seen(shape: Shape) -> int:
    """The keys of all heads without padding, which need not be read."""
    return shape.Hkv * sum(shape.lengths)


def of_passes(shape: Shape, element_size: int, ceilings: Ceilings) -> dict[str, Any]:
    """The work of each pass and its roofline (`floor_ms`), as a file of results has them."""
    work = {"forward": forward_work(shape, element_size)}
    if shape.trained:
        work["backward"] = backward_work(shape, element_size)
        work["step"] = work["forward"] + work["backward"]
    least = {name: each.least_ms(ceilings) for name, each in work.items()}
    return {"work": {name: asdict(each) for name, each in work.items()}, "floor_ms": least}


def measured_ceilings(
    device: torch.device,
    *,
    rounds: int = 10,
    clock_rate: float = 0.0,
    sizes: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Ceilings:
    """By a large product of random matrices, a large copy, and a sum over as much.

    The special functions are counted by the highest clock in Hz, where it is known. Sizes are those of a matrix's side
    and of the copy in bytes. The dtype is that of the product; None: bfloat16 on a GPU, float32 on a CPU.
    """
    on_gpu = device.type == "cuda"
    size, copied = sizes or ((8192, 1 << 32) if on_gpu else (1024, 1 << 27))
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(copied // 4, device=device).view(torch.uint8)
    target = torch.empty_like(source)
    times = compare(
        {
            "product": lambda: [lambda: torch.mm(a, b, out=product)],
            "copy": lambda: [lambda: target.copy_(source)],
            "read": lambda: [lambda: torch.sum(source.view(torch.float32))],
        },
        device=device,
        rounds=rounds,
        eager=not on_gpu,
    )
    if errors := {name: m.error or m.graph_error for name, m in times.items() if m.best is None}:
        raise RuntimeError(f"the ceilings could not be measured: {errors}")
    seconds = {name: m.best.fastest / 1e3 for name, m in times.items() if m.best}
    special = 0.0
    if on_gpu:
        device_properties = torch.cuda.get_device_properties(device)
        clock = clock_rate or getattr(device_properties, "clock_rate", 0) * 1e3  # the latter in kHz
        special = SPECIAL_A_CLOCK * device_properties.multi_processor_count * clock
    flops, both_ways, read = 2 * size**3 / seconds["product"], 2 * copied / seconds["copy"], copied / seconds["read"]
    return Ceilings(flops, both_ways, read, special)


def main(arguments: list[str] | None = None) -> int:
    line = Command(__spec__.name, __doc__, "ceilings", dry_run="small sizes, to see that it runs")
    options = line.parse(arguments)
    results = line.results(options)
    device = results.document["device"]
    sizes = (128, 1 << 20) if options.dry_run else None
    ceilings = measured_ceilings(torch.device(device["type"]), clock_rate=highest_clock(device), sizes=sizes)
    results.document["ceilings"] = asdict(ceilings)
    results.add("ceilings", {"summary": str(ceilings)})
    print(ceilings)
    return 0


def highest_clock(device: dict[str, Any]) -> float:
    """The highest clock in Hz, as the driver says; 0: not known."""
    found = re.search(r"(\d+) MHz", device.get("nvidia_smi") or "")
    return int(found[1]) * 1e6 if found else 0.0


if __name__ == "__main__":
    sys.exit(main())
