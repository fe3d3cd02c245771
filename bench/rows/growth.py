"""How the time grows with the length N, the prefix's rows P, the batch, and the tasks in a mixed batch.

    python -m qtuning_fast.bench.rows.growth
    python -m qtuning_fast.bench.rows.growth --with P --peer composed eager

These are steps of BERT-base's heads. For the tasks of a mixed batch, as a server has it, they are forward passes with
folded prefixes.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from qtuning_fast.bench.measure import as_json, broken, default_device, default_dtype, measure_cases
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.plans.durations import row_seconds, turns_seconds
from qtuning_fast.bench.plans.schedule import RESTART, Schedule, Unit
from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.rows import tables
from qtuning_fast.bench.rows.command import Command, measure_each, turns_of
from qtuning_fast.bench.shapes import BERT_BASE, TINY, Shape
from qtuning_fast.bench.timing import Turns

GROWTH_TURNS = Turns(rounds=20, seconds=1.5)
PEERS_BY_DEVICE = {
    "cuda": ("fused", "composed", "eager", "flex-frozen-gate", "sdpa"),
    "cpu": ("native", "eager", "sdpa"),
}


@dataclass(frozen=True)
class Series:
    """One size of a shape that grows."""

    size: str  # a field of Shape
    base: Shape
    on_gpu: tuple[int, ...]
    on_cpu: tuple[int, ...]
    fixed: dict[str, int]  # what else a CPU has otherwise

    def shapes(self, device: str, *, tiny: bool) -> dict[int, Shape]:
        sizes = self.on_gpu if device == "cuda" else self.on_cpu
        if tiny:
            base, sizes = replace(TINY, trained=self.base.trained), (2, 3)
        else:
            base = self.base if device == "cuda" else replace(self.base, **self.fixed)
        return {size: replace(base, **{self.size: size}, name=f"{self.size}={size}") for size in sizes}


_SERVING = replace(BERT_BASE, trained=False)
SERIES = {
    "N": Series("N", BERT_BASE, (128, 256, 512, 1024, 2048, 4096), (64, 128, 256, 512, 1024, 2048), {"B": 2}),
    "P": Series("P", BERT_BASE, (10, 30, 60, 120, 250, 500, 1000), (10, 30, 60, 120, 250, 500, 1000), {"B": 4}),
    "B": Series("B", BERT_BASE, (1, 4, 16, 64, 256), (1, 2, 4, 8, 16, 32), {}),
    "tasks": Series("tasks", _SERVING, (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16), {"B": 16}),
}


def units(of: str, shapes: dict[int, Shape], peers: Sequence[str], turns: Turns) -> list[Unit]:
    """Each size, with the seconds that it is expected to take."""

    def seconds(shape: Shape) -> float:
        return sum(row_seconds(shape, peer) for peer in peers) + turns_seconds(shape, peers, turns)

    return [Unit(f"{of}={size}", seconds(shape), "point", size) for size, shape in shapes.items()]


def measure(
    of: str,
    shapes: dict[int, Shape],
    peers: Sequence[str],
    device: str,
    turns: Turns,
    *,
    schedule: Schedule | None = None,
    known: Mapping[str, Any] | None = None,
    wrote: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> dict[str, Any]:
    """One series, as far as there is time. On a GPU the graphs of a size are freed before the next size."""
    started, points = time.perf_counter(), dict((known or {}).get("points", {}))
    schedule = schedule or Schedule()
    first = next(iter(shapes.values()))
    entry = {"of": of, "title": str(first), "pass": "step" if first.trained else "forward", "peers": peers}

    def by_now() -> dict[str, Any]:
        return entry | {"points": points, "seconds": round(time.perf_counter() - started, 1)}

    for unit in schedule.each(units(of, shapes, peers, turns)):
        size, shape = unit.of, shapes[unit.of]
        torch._dynamo.reset()  # else the eighth size would not be compiled any more
        cases = {peer: (shape, peer) for peer in peers}
        points[str(size)] = as_json(measure_cases(cases, device, default_dtype(device), turns))
        wrote(by_now())
        if broken(device):
            raise SystemExit(RESTART)
    return by_now()


def command() -> Command:
    """The command line."""
    found, usual = Command(__spec__.name, __doc__, deadline=True), PEERS_BY_DEVICE[default_device()]
    found.add_argument("--with", dest="sizes", nargs="+", choices=SERIES, default=list(SERIES))
    found.add_argument("--peer", nargs="+", choices=PEERS, default=list(usual))
    return found


def main(arguments: list[str] | None = None) -> int:
    line, device = command(), default_device()
    options = line.parse(arguments)
    settle()
    results, turns = line.results(options), turns_of(options, GROWTH_TURNS)
    chosen = {name: SERIES[name].shapes(device, tiny=options.dry_run) for name in options.sizes}
    jobs = {name: partial(measure, name, shapes, options.peer, device, turns) for name, shapes in chosen.items()}
    return measure_each(results, jobs, tables.growth, options.deadline)


if __name__ == "__main__":
    sys.exit(main())
