"""How much other processes slow a training step down that shares its cores with them.

    python -m qtuning_fast.bench.rows.busy

Peers take turns alone, then beside one and beside two processes that compute all the time. What counts is the slowdown:
the time of a step beside others over its time alone.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from qtuning_fast.bench.measure import TURNS, as_json, default_dtype, measure_cases
from qtuning_fast.bench.rows import tables
from qtuning_fast.bench.rows.command import Command, measure_each, turns_of
from qtuning_fast.bench.shapes import MINILM_48_CPU, MINILM_CPU, TINY, Shape
from qtuning_fast.bench.timing import Turns

PEERS = ("native", "composed", "eager", "eager-compiled", "sdpa")
BESIDE = (0, 1, 2)  # other processes
SHAPES = (MINILM_CPU, MINILM_48_CPU)


@contextmanager
def others(count: int) -> Iterator[None]:
    """So many processes compute while the context is open."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def measure(shape: Shape, turns: Turns) -> dict[str, Any]:
    """The entry of a shape."""
    rows = {}
    for count in BESIDE:
        with others(count):
            cases = {peer: (shape, peer) for peer in PEERS}
            rows[str(count)] = as_json(measure_cases(cases, "cpu", default_dtype("cpu"), turns))
    return {"about": str(shape), "of": shape.of, "beside": rows}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results; return the exit status."""
    line = Command(__spec__.name, __doc__, quick=True)
    options = line.parse(arguments)
    results, turns = line.results(options, "cpu"), turns_of(options, TURNS)
    measured = (TINY,) if options.dry_run else SHAPES
    jobs = {f"N{shape.N}": partial(measure, shape, turns) for shape in measured}
    return measure_each(results, jobs, tables.busy)


if __name__ == "__main__":
    sys.exit(main())
