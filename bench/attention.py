"""The operator beside its peers, shape by shape: forward, backward and both, of one layer.

    python -m qtuning_fast.bench.attention                          all shapes for the device at hand, all peers
    python -m qtuning_fast.bench.attention --shape bert-base llama-8b --peer fused flex sdpa --quick

In training query, key, value, the prefix, U, V, alpha and tau are all trained; what belongs to the prefix is float32,
the rest bfloat16 (float32 on a CPU). Before a peer is timed its output and its gradients are compared with a float64
reference on part of the batch. Peers without a gate compute less: they are compared with what they compute, and show
what a gate costs. The table gives milliseconds a call, on a GPU by graph replay (and by the host's clock, column
eager), the ratio to ours, the fraction of the floor, the memory that a step takes, and the largest errors of output and
gradients.
"""

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from qtuning_fast.bench import tables
from qtuning_fast.bench.accuracy import prepare
from qtuning_fast.bench.floors import Ceilings, measured_ceilings
from qtuning_fast.bench.measure import (
    QUICK,
    REHEARSED,
    TURNS,
    default_device,
    default_dtype,
    in_a_process,
    measure,
    measure_each,
)
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.results import RUNS, Results
from qtuning_fast.bench.shapes import CPU, GPU, SHAPES, TINIES, Shape, inputs

ONLY_ON_A_GPU = ("fused", "cudnn", "flash", "efficient", "flex-approx")
IN_INGREDIENTS = ("-no-gate", "-no-reweighting")  # measured there
PEAKS = (
    "fused",
    "composed",
    "composed-plain",
    "reference",
    "eager",
    "flex-frozen-gate",
    "sdpa",
)  # who is asked for memory
COMPILED = ("flex-frozen-gate", "flex-merged", "flex-approx-frozen-gate", "flex", "eager-compiled")


def main(arguments: list[str] | None = None) -> int:
    return ask("attention", __doc__, arguments, trained=True)


def ask(question: str, about: str | None, arguments: list[str] | None, *, trained: bool) -> int:
    """Measures shapes, those that are trained or the others, and writes and prints what comes of it."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, metavar="NAME", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--peer", nargs="+", choices=PEERS, metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--quick", action="store_true", help=f"at most {QUICK.rounds} rounds, not {TURNS.rounds}")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, to see that all is there")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="begin no shape after so many")
    parser.add_argument("--out", type=Path, default=RUNS / f"{question}.json", metavar="FILE")
    options = parser.parse_args(arguments)
    usual = TINIES if options.dry_run else GPU if default_device() == "cuda" else CPU
    chosen = [SHAPES[name] for name in options.shape or ()] or [shape for shape in usual if shape.trained == trained]
    peers = options.peer or default_peers(default_device())

    given = sys.argv[1:] if arguments is None else arguments
    started = time.perf_counter()
    results, ceilings = begin(question, options.out, given)
    if default_device() == "cuda":
        compile_ahead(chosen, [peer for peer in peers if peer in COMPILED], 0.4 * options.budget_seconds)
    turns = REHEARSED if options.dry_run else QUICK if options.quick else TURNS
    one = partial(measure, peers=peers, device=default_device(), ceilings=ceilings, turns=turns, peaks=PEAKS)
    jobs = {shape.name: partial(one, shape) for shape in chosen}
    left = options.budget_seconds - (time.perf_counter() - started)
    return measure_each(results, jobs, tables.attention, seconds=left)


def begin(question: str, out: Path, arguments: Sequence[str]) -> tuple[Results, Ceilings]:
    """The file, with the device's ceilings in it; and a heading on the screen."""
    device = default_device()
    ceilings = in_a_process(measured_ceilings, torch.device(device))
    results = Results(question, out, device, arguments, ceilings=asdict(ceilings))
    rates = f"copying {ceilings.copied / 1e12:.3f} TB/s, reading {ceilings.read / 1e12:.3f} TB/s"
    print(f"{results.heading()}\nceilings: {ceilings.flops / 1e12:.2f} TFLOP/s, {rates}", flush=True)
    return results, ceilings


def compile_ahead(shapes: Sequence[Shape], peers: Sequence[str], seconds: float) -> None:
    """Fills the compilers' caches on disk, by many processes, for as long as there is time: the first shapes first."""
    jobs = [(shape, peer) for shape in shapes for peer in peers]
    if not jobs:
        return
    started = time.perf_counter()
    workers = max(1, (os.cpu_count() or 1) - 2)
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # in each process, which are many already
    with patch.dict(os.environ, alone), multiprocessing.get_context("spawn").Pool(workers) as pool:
        compiled = pool.starmap_async(compile_peer, jobs, chunksize=1)
        compiled.wait(None if math.isinf(seconds) else seconds)  # who is not done by then is ended
    done = "all" if compiled.ready() else "some"
    print(f"{done} of {len(jobs)} peers compiled in {time.perf_counter() - started:.0f} s", flush=True)


def compile_peer(shape: Shape, peer: str) -> None:
    """Runs it once; who fails does so again when it is measured, and is reported then."""
    with suppress(Exception):
        x = inputs(shape, dtype=default_dtype("cuda"), device="cuda")
        prepared = prepare(PEERS[peer], shape, x, training=shape.trained)
        prepared.step(x.d_output) if shape.trained else prepared.forward()


def default_peers(device: str) -> list[str]:
    """All there are, but for those that no CPU has."""
    left_out = IN_INGREDIENTS if device == "cuda" else IN_INGREDIENTS + ONLY_ON_A_GPU
    return [name for name in PEERS if not any(part in name for part in left_out)]


if __name__ == "__main__":
    sys.exit(main())
