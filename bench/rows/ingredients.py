"""What each ingredient of a training step costs: gate, reweighting, a bank of prefixes, padding, by leaving it out.

    python -m qtuning_fast.bench.rows.ingredients
    python -m qtuning_fast.bench.rows.ingredients --shape bert-base --peer fused

The step with all of them and the steps without one of each take turns in the same run. Without a bank all samples share
one prefix; without padding the context is whole, so the same queries see more keys.
"""

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qtuning_fast.bench import tables
from qtuning_fast.bench.measure import (
    QUICK,
    REHEARSED,
    TURNS,
    as_json,
    default_device,
    default_dtype,
    measure_cases,
    measure_each,
)
from qtuning_fast.bench.peers import OURS
from qtuning_fast.bench.results import RUNS, Results
from qtuning_fast.bench.shapes import SHAPES, TINY, Shape
from qtuning_fast.bench.timing import Turns

ON_GPU = ("bert-base", "bert-base-512")
ON_CPU = ("bert-base-cpu", "bert-base-512-cpu")
TASKS, PADDING = 4, 0.25


def cases(shape: Shape, peer: str) -> dict[str, tuple[Shape, str]]:
    """By what is left out: a shape and a peer."""
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
    device = default_device()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = [name for name, shape in SHAPES.items() if shape.trained and not (shape.bias or shape.padding)]
    parser.add_argument("--shape", nargs="+", choices=trained, metavar="NAME", help=f"of {', '.join(trained)}")
    parser.add_argument("--peer", nargs="+", choices=OURS, default=list(OURS if device == "cuda" else OURS[1:]))
    parser.add_argument("--quick", action="store_true", help=f"at most {QUICK.rounds} rounds, not {TURNS.rounds}")
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape, to see that all is there")
    parser.add_argument("--out", type=Path, default=RUNS / "ingredients.json", metavar="FILE")
    options = parser.parse_args(arguments)
    named = options.shape or (ON_GPU if device == "cuda" else ON_CPU)
    shapes = [replace(TINY, Hq=1, Hkv=1, N=8)] if options.dry_run else [SHAPES[name] for name in named]

    results = Results("ingredients", options.out, device, sys.argv[1:] if arguments is None else arguments)
    print(results.heading(), flush=True)
    turns = REHEARSED if options.dry_run else QUICK if options.quick else TURNS
    chosen = [(shape, peer) for shape in shapes for peer in options.peer]
    jobs = {f"{shape.name} {peer}": partial(measure, shape, peer, device, turns) for shape, peer in chosen}
    return measure_each(results, jobs, tables.ingredients)


if __name__ == "__main__":
    sys.exit(main())
