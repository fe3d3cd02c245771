"""Decoding: one new token for each of many sequences that share a prefix, or use a few in no order.

    python -m qtuning_fast.bench.decode                    all shapes of the device at hand
    python -m qtuning_fast.bench.decode --batch 64 --out FILE

The peer is PyTorch's attention, without a gate, whose cache already holds the prefix in front of every sequence's
context: putting it there is not timed. The floor counts each byte that is needed once: the caches, each prefix in use,
queries and outputs; the ceiling is the bandwidth of reading, measured in the same run. Outputs without a gate are
compared with the peer's before anything is timed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtuning_fast import prefix_attention
from qtuning_fast.bench.attention import device_facts
from qtuning_fast.bench.timing import Call, Measurement, compare, sets_for

ROUNDS = 40
BACKENDS = ("composed", "fused", "reference")
TOLERANCE = {torch.bfloat16: 2**-6, torch.float32: 1e-4}  # ‖x - peer's‖ / ‖peer's‖


@dataclass(frozen=True)
class Decoding:
    """One step."""

    B: int
    Hq: int
    Hkv: int
    D: int
    M: int  # tokens in the cache
    P: int
    tasks: int  # prefixes that are in use; 1: one for all, and no bank

    def __str__(self) -> str:
        tasks = "one task" if self.tasks == 1 else f"{self.tasks} tasks"
        return f"B{self.B} Hq{self.Hq} Hkv{self.Hkv} D{self.D} M{self.M} P{self.P}, {tasks}"

    def needed_bytes(self, element_size: int) -> int:
        """Each once."""
        cached, prefixes = self.B * self.M, self.tasks * self.P
        return (2 * self.Hkv * (cached + prefixes) + 2 * self.B * self.Hq) * self.D * element_size


LLAMA = {"Hq": 32, "Hkv": 8, "D": 128, "M": 1024, "P": 512}
ON_GPU = (Decoding(64, tasks=1, **LLAMA), Decoding(256, tasks=1, **LLAMA), Decoding(64, tasks=16, **LLAMA))
ON_CPU = (Decoding(16, tasks=1, **LLAMA), Decoding(16, tasks=16, **LLAMA))


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    prefix_index: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if x is not None)


def inputs(shape: Decoding, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    bank = () if shape.tasks == 1 else (shape.tasks,)
    index = torch.arange(shape.B, device=device) % shape.tasks
    order = torch.randperm(shape.B, generator=generator, device=device)
    return Inputs(
        query=normal(shape.B, shape.Hq, 1, shape.D),
        key=normal(shape.B, shape.Hkv, shape.M, shape.D),
        value=normal(shape.B, shape.Hkv, shape.M, shape.D),
        prefix_key=normal(*bank, shape.Hkv, shape.P, shape.D),
        prefix_value=normal(*bank, shape.Hkv, shape.P, shape.D),
        prefix_index=index[order] if bank else None,
    )


def ours(backend: str, gate: str | None, x: Inputs) -> Call:
    arguments = vars(x) | {"gate": gate, "backend": backend}
    return lambda: prefix_attention(**arguments)


def expanded_cache(x: Inputs) -> Call:
    B = len(x.query)
    sides = (x.prefix_key, x.key), (x.prefix_value, x.value)
    caches = [
        torch.cat([rows.expand(B, -1, -1, -1) if x.prefix_index is None else rows[x.prefix_index], context], dim=2)
        for rows, context in sides
    ]
    return lambda: F.scaled_dot_product_attention(x.query, *caches, enable_gqa=True)


def measure(shape: Decoding, device: str, rounds: int, bandwidth: float) -> dict[str, Any]:
    gpu = torch.device(device)
    dtype = torch.bfloat16 if gpu.type == "cuda" else torch.float32
    first = inputs(shape, dtype, device, 0)
    sets = [first, *(inputs(shape, dtype, device, seed) for seed in range(1, sets_for(first.nbytes, gpu)))]
    peers: dict[str, Callable[[Inputs], Call]] = {"sdpa-expanded-cache": expanded_cache}
    peers |= {name: partial(ours, name, "tanh") for name in BACKENDS if name != "fused" or gpu.type == "cuda"}
    peers["composed-ungated"] = partial(ours, "composed", None)

    with torch.no_grad():
        expected = expanded_cache(first)().double()
        for name in BACKENDS:
            if name in peers:
                found = ours(name, None, first)().double()
                error = ((found - expected).norm() / expected.norm()).item()
                if not error < TOLERANCE[dtype]:
                    raise AssertionError(f"{name} is not the peer's attention: off by {error:.2g}")
        setups = {name: partial(_calls, peer, sets) for name, peer in peers.items()}
        times = compare(setups, device=gpu, rounds=rounds)
    needed = shape.needed_bytes(dtype.itemsize)
    return {
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "needed_bytes": needed,
        "floor_ms": needed / bandwidth * 1e3,
        "rows": {name: asdict(measurement) for name, measurement in times.items()},
        "table": table(shape, times, needed / bandwidth * 1e3),
    }


def _calls(peer: Callable[[Inputs], Call], sets: Sequence[Inputs]) -> list[Call]:
    return [peer(x) for x in sets]


def table(shape: Decoding, times: dict[str, Measurement], floor: float) -> str:
    lines = [f"{shape}", f"  floor {floor:.4f} ms", f"  {'':<22}{'ms':>10}{'±iqr':>10}{'speed':>8}{'of floor':>10}"]
    peer = times["sdpa-expanded-cache"].best
    for name, measurement in times.items():
        best = measurement.best
        if best is None or peer is None:
            lines.append(f"  {name:<22}{measurement.error or '-'}"[:120])
            continue
        speed = peer.median / best.median
        lines.append(f"  {name:<22}{best.median:>10.4f}{best.spread:>10.4f}{speed:>8.2f}{floor / best.median:>10.0%}")
    return "\n".join(lines)


def read_bandwidth(device: str) -> float:
    """Bytes a second: a sum over more than any cache holds."""
    gpu = torch.device(device)
    count = 1 << 28 if gpu.type == "cuda" else 1 << 25
    x = [torch.ones(count, device=device) for _ in range(2)]
    best = compare({"read": lambda: [partial(torch.sum, y) for y in x]}, device=gpu, rounds=10)["read"].best
    assert best is not None
    return x[0].nbytes / best.median * 1e3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", help="only shapes of these batch sizes")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/decode.json"), metavar="FILE")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, versions = device_facts(device)
    bandwidth = read_bandwidth(device)
    document: dict[str, Any] = {"versions": versions, "read_bytes_a_second": bandwidth, "rounds": options.rounds}
    document["shapes"] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"reading: {bandwidth / 1e12:.3f} TB/s; speed: over the expanded cache's")
    for shape in ON_GPU if device == "cuda" else ON_CPU:
        if options.batch is None or shape.B in options.batch:
            result = measure(shape, device, options.rounds, bandwidth)
            print(f"\n{result.pop('table')}", flush=True)
            document["shapes"].append(result)
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
