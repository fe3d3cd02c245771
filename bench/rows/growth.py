"""How the time grows with the length N, the prefix's rows P, the batch, and the tasks in a mixed batch.

    python -m qtuning_fast.bench.rows.growth
    python -m qtuning_fast.bench.rows.growth --with P --peer composed eager

Steps of BERT-base's heads; for the tasks of a mixed batch, which is what a server sees, forward passes with folded
prefixes.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtuning_fast.bench import tables
from qtuning_fast.bench.durations import row_seconds, turns_seconds
from qtuning_fast.bench.measure import (
    REHEARSED,
    as_json,
    broken,
    default_device,
    default_dtype,
    measure_cases,
    measure_each,
    scheduled,
)
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.results import RUNS, Results
from qtuning_fast.bench.schedule import RESTART, Schedule, Unit
from qtuning_fast.bench.shapes import BERT_BASE, TINY, Shape
from qtuning_fast.bench.timing import Turns

GROWTH_TURNS = Turns(rounds=20, seconds=1.5)
PEERS_ON_GPU = ("fused", "composed", "eager", "flex-frozen-gate", "sdpa")
PEERS_ON_CPU = ("composed", "eager", "sdpa")


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
    """Each size, and the seconds that are expected of it."""
    return [
        Unit(
            f"{of}={size}",
            sum(row_seconds(shape, peer) for peer in peers) + turns_seconds(shape, peers, turns),
            "point",
            size,
        )
        for size, shape in shapes.items()
    ]


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
    """One series, as far as there is time. On a GPU each size's graphs are gone before the next one's are made."""
    started, points = time.perf_counter(), dict((known or {}).get("points", {}))
    schedule = schedule or Schedule()
    first = next(iter(shapes.values()))
    entry = {"of": of, "title": str(first), "pass": "step" if first.trained else "forward", "peers": peers}

    def by_now() -> dict[str, Any]:
        return entry | {"points": points, "seconds": round(time.perf_counter() - started, 1)}

    for unit in units(of, shapes, peers, turns):
        size, shape = unit.of, shapes[unit.of]
        if not schedule.may_begin(unit.name, unit.seconds):
            continue
        torch._dynamo.reset()  # else the eighth size would not be compiled any more
        cases = {peer: (shape, peer) for peer in peers}
        points[str(size)] = as_json(measure_cases(cases, device, default_dtype(device), turns))
        wrote(by_now())
        if broken(device):
            raise SystemExit(RESTART)
    schedule.end()
    return by_now()


def parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with", dest="sizes", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument(
        "--peer", nargs="+", choices=PEERS, default=list(PEERS_ON_GPU if device == "cuda" else PEERS_ON_CPU)
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, to see that all is there")
    parser.add_argument("--deadline", type=float, help="leave out what would end later, by time.monotonic()")
    parser.add_argument("--out", type=Path, default=RUNS / "growth.json", metavar="FILE")
    return parser


def main(arguments: list[str] | None = None) -> int:
    device, options = default_device(), parser().parse_args(arguments)

    settle()
    within = options.deadline is not None  # a plan: one process, which leaves out what there is no time for
    given = sys.argv[1:] if arguments is None else arguments
    results = Results("growth", options.out, device, given, going_on=within)
    print(results.heading(), flush=True)
    turns = REHEARSED if options.dry_run else GROWTH_TURNS
    chosen = {name: SERIES[name].shapes(device, tiny=options.dry_run) for name in options.sizes}
    jobs = {name: partial(measure, name, shapes, options.peer, device, turns) for name, shapes in chosen.items()}
    if within:
        jobs = scheduled(jobs, results, options.deadline)
    return measure_each(results, jobs, tables.growth, each_apart=not within)


if __name__ == "__main__":
    sys.exit(main())
