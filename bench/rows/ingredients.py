"""What each ingredient of a training step costs: gate, reweighting, a bank of prefixes and padding, by leaving it out.

    python -m qtuning_fast.bench.rows.ingredients
    python -m qtuning_fast.bench.rows.ingredients --shape bert-base --peer fused

The step with all of them and the steps without one of them take turns in the same run. Without a bank all samples share
one prefix; without padding the same queries see more keys.
"""

import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

from qtuning_fast.bench.measure import as_json, default_device, default_dtype, measure_cases
from qtuning_fast.bench.peers import OURS
from qtuning_fast.bench.rows import tables
from qtuning_fast.bench.rows.command import Command, measure_each, turns_of
from qtuning_fast.bench.shapes import SHAPES, TINY, Shape
from qtuning_fast.bench.timing import Turns

ON_GPU = ("bert-base", "bert-base-512")
ON_CPU = ("bert-base-cpu", "bert-base-512-cpu")
TASKS, PADDING = 4, 0.25


def cases(shape: Shape, peer: str) -> dict[str, tuple[Shape, str]]:
    """A shape and a peer, by what is left out."""
    whole = replace(shape, tasks=min(TASKS, shape.B), padding=PADDING)
    return {
        "all": (whole, peer),
        "without gate": (whole, f"{peer}-no-gate"),
        "without reweighting": (whole, f"{peer}-no-reweighting"),
        "without bank": (replace(whole, tasks=1), peer),
        "without padding": (replace(whole, padding=0.0), peer),
        "without any": (replace(whole, tasks=1, padding=0.0), f"{peer}-plain"),
    }


def measure(shape: Shape, peer: str, device: str, turns: Turns) -> dict[str, Any]:
    started, dtype = time.perf_counter(), default_dtype(device)
    rows = measure_cases(cases(shape, peer), device, dtype, turns)
    return {
        "name": shape.name,
        "peer": peer,
        "title": str(cases(shape, peer)["all"][0]),
        "dtype": str(dtype).removeprefix("torch."),
        "rows": as_json(rows),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    line, device = Command(__spec__.name, __doc__, quick=True), default_device()
    trained = [name for name, shape in SHAPES.items() if shape.trained and not (shape.bias or shape.padding)]
    line.add_argument("--shape", nargs="+", choices=trained, metavar="NAME", help=f"of {', '.join(trained)}")
    line.add_argument("--peer", nargs="+", choices=OURS, default=list(OURS if device == "cuda" else OURS[1:]))
    options = line.parse(arguments)
    named = options.shape or (ON_GPU if device == "cuda" else ON_CPU)
    shapes = [replace(TINY, Hq=1, Hkv=1, N=8)] if options.dry_run else [SHAPES[name] for name in named]
    chosen, turns = [(shape, peer) for shape in shapes for peer in options.peer], turns_of(options)
    jobs = {f"{shape.name} {peer}": partial(measure, shape, peer, device, turns) for shape, peer in chosen}
    return measure_each(line.results(options), jobs, tables.ingredients)


if __name__ == "__main__":
    sys.exit(main())
