"""Measures from which size on which backend is the fastest on this device, and writes the rules for `auto`.

    python -m qtuning_fast.bench.plans.rank_backends   rewrites the device's lines in backend_order.json
    python -m qtuning_fast.bench.plans.rank_backends --dry-run   only prints what it would write

A training step, forward and backward, is measured at growing sizes. On a CPU the native and the composed backend stand
beside the reference, by the number of scores: the native one where it compiles, else the composed one. On a GPU the
composed backend stands beside the fused one, by the number of context keys. A bound is the geometric mean of the last
size at which a backend is slower and of the next size. If there was no time for all sizes, no rule is rewritten.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from qtuning_fast.attention import backend_order
from qtuning_fast.attention.backend_order import Rule
from qtuning_fast.attention.composed.vendors import FEW_QUERIES
from qtuning_fast.bench import shapes
from qtuning_fast.bench.accuracy import prepare
from qtuning_fast.bench.measure import default_device, default_dtype
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.plans.durations import row_seconds
from qtuning_fast.bench.plans.schedule import NO_TIME, Schedule, Unit
from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.rows.command import Command
from qtuning_fast.bench.shapes import Inputs, Shape
from qtuning_fast.bench.timing import Call, compare, sets_for

ROUNDS = 15
# Native kernels read the keys once for each head, unless there is one query: two to four over many keys are not worth
# it.
_BY_HAND = "AMD EPYC, 2 threads, torch 2.13.0+cpu, by hand"
FEW_ON_CPU = (
    Rule("cpu", "native", most_queries=1, measured=_BY_HAND),
    Rule("cpu", "native", most_scores=50_000, measured=_BY_HAND),
    Rule("cpu", "composed", most_queries=4, least_keys=512, measured=_BY_HAND),
)
BACKENDS = {"cpu": ("native", "composed", "reference"), "cuda": ("composed", "fused")}  # that are measured, by device


@dataclass(frozen=True)
class Point:
    """The backends at one size."""

    size: int  # scores on a CPU, context keys on a GPU
    shape: Shape
    times: dict[str, float]  # milliseconds by backend

    def __str__(self) -> str:
        times = ", ".join(f"{backend} {ms:.3f} ms" for backend, ms in self.times.items())
        return f"{self.shape}, {self.size:,}: {times}"


def training_shapes(device: str) -> list[Shape]:
    """Shapes of growing size: on a CPU MiniLM's heads from four tokens on, on a GPU those of BERT-base and Llama."""
    if device == "cpu":
        sizes = [(1, 4), (1, 8), (1, 16), (2, 16), (4, 16), (4, 32), (8, 32), (8, 64), (16, 64), (16, 128)]
        return [Shape(f"B{B} N{N}", B=B, Hq=12, Hkv=12, N=N, D=32, P=50) for B, N in sizes]
    lengths = [2**n for n in range(7, 14)]
    bert = [Shape(f"N{N}", B=max(4096 // N, 1), Hq=12, Hkv=12, N=N, D=64, P=60) for N in lengths]
    llama = [
        Shape(f"N{N} causal", B=max(4096 // N, 1), Hq=32, Hkv=8, N=N, D=128, P=100, is_causal=True) for N in lengths
    ]
    return [shape for pair in zip(bert, llama) for shape in pair]


def units(shapes_measured: Sequence[Shape]) -> list[Unit]:
    """Each shape, with the seconds that it is expected to take."""
    peers = ("composed", "fused", "native")
    return [Unit(s.name, sum(row_seconds(s, peer) for peer in peers), "point", s) for s in shapes_measured]


def measure(
    device: str,
    rounds: int,
    shapes_measured: Sequence[Shape],
    heard: Callable[[Point], None],
    schedule: Schedule | None = None,
) -> list[Point]:
    """Measures shape after shape, as far as there is time, and passes on each point."""
    schedule = schedule or Schedule()
    gpu = torch.device(device)
    dtype = default_dtype(device)
    points = []
    for unit in schedule.each(units(shapes_measured)):
        shape = unit.of
        count = sets_for(shapes.inputs(shape, dtype=dtype, device="meta").nbytes, gpu)
        sets = shapes.input_sets(shape, count, dtype=dtype, device=device)
        setups = {peer: partial(_steps, peer, shape, sets) for peer in BACKENDS[gpu.type]}
        times = compare(setups, device=gpu, rounds=rounds)
        clock = "graph" if all(x.graph for x in times.values()) else "eager"
        timings = {peer: getattr(x, clock) for peer, x in times.items()}
        if None in timings.values():
            print(f"{shape}: left out, {'; '.join(x.error for x in times.values() if x.error)}", flush=True)
            continue
        scores = shape.B * shape.Hq * shape.N * (shape.N + shape.P)
        size = scores if gpu.type == "cpu" else shape.N
        points.append(Point(size, shape, {peer: timing.median for peer, timing in timings.items()}))
        print(points[-1], flush=True)
        heard(points[-1])
    return sorted(points, key=lambda point: point.size)


def _steps(peer: str, shape: Shape, sets: Sequence[Inputs]) -> list[Call]:
    return [partial(prepare(PEERS[peer], shape, x, training=True).step, x.d_output) for x in sets]


def crossing(points: Sequence[Point], backend: str, other: str) -> int:
    """The size from which on a backend is never slower than another; beyond the largest size if it always is."""
    slower = [point.size for point in points if point.times[backend] > point.times[other]]
    if not slower:
        return 0
    faster = [point.size for point in points if point.size > max(slower)]
    return round(math.sqrt(max(slower) * min(faster))) if faster else 2 * max(slower)


def rules(device: str, points: Sequence[Point], measured: str) -> list[Rule]:
    """The rules for this device."""
    name = backend_order.device_name(torch.device(device))
    if device == "cpu":
        found = []
        for backend in ("native", "composed"):
            bound = crossing(points, backend, "reference")
            small = Rule(name, "reference", most_scores=bound, measured=measured)
            found += [small] * (bound > 0) + [Rule(name, backend, measured=measured)]
        first = 1 if found[0].backend == "reference" else 0
        return [*found[:first], *FEW_ON_CPU, *found[first:]]
    bound, composed = crossing(points, "composed", "fused"), Rule(name, "composed", measured=measured)
    if not bound:
        return [composed]
    decoding = Rule(name, "composed", most_queries=FEW_QUERIES)  # taken over from the default
    long = Rule(name, "composed", least_keys=bound, measured=measured)
    return [decoding, long, Rule(name, "fused", measured=measured)]


def main(arguments: list[str] | None = None) -> int:
    line = Command(__spec__.name, __doc__, dry_run="leave backend_order.json as it is", deadline=True)
    line.add_argument("--rounds", type=int, default=ROUNDS)
    options = line.parse(arguments)
    settle()
    device, results = default_device(), line.results(options)

    def heard(p: Point) -> None:
        results.add(p.shape.name, {"size": p.size, "title": str(p.shape)} | p.times)

    schedule = Schedule.of(results, options.deadline)
    points = measure(device, options.rounds, training_shapes(device), heard, schedule)
    if not points:
        print("nothing was measured: the table stays as it is")
        return 1
    found = rules(device, points, results.measured())
    print(*found, sep="\n")
    if not options.dry_run and NO_TIME not in (entry["status"] for entry in schedule.log.values()):
        others = [rule for rule in backend_order.TABLE if rule.device != found[0].device]
        backend_order.write([*found, *others])
    return 0


if __name__ == "__main__":
    sys.exit(main())
