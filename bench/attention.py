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
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from qtuning_fast.bench import tables
from qtuning_fast.bench.accuracy import prepare
from qtuning_fast.bench.floors import Ceilings, measured_ceilings
from qtuning_fast.bench.measure import QUICK, REHEARSED, TURNS, default_device, default_dtype, in_a_process, measure
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.results import RUNS, Results
from qtuning_fast.bench.shapes import CPU, GPU, SHAPES, TINIES, Shape, inputs
from qtuning_fast.bench.timing import first_line

ONLY_ON_A_GPU = ("fused", "cudnn", "flash", "efficient", "tanh-approx")
IN_INGREDIENTS = ("-no-gate", "-no-reweighting")  # measured there
PEAKS = ("fused", "composed", "composed-plain", "reference", "eager", "flex", "sdpa")  # who is asked for memory
COMPILED = ("eager-compiled", "flex", "flex-merged", "flex-tanh-approx", "flex-flash")
COMPILERS = 6  # processes that compile side by side


def main(arguments: list[str] | None = None) -> int:
    return ask("attention", __doc__, [s for s in _all_shapes() if not _decodes(s)], arguments)


def ask(question: str, about: str | None, shapes: Sequence[Shape], arguments: list[str] | None) -> int:
    """Measures shapes, unless the command line names others, and writes and prints what comes of it."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, metavar="NAME", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--peer", nargs="+", choices=PEERS, metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--quick", action="store_true", help=f"at most {QUICK.rounds} rounds, not {TURNS.rounds}")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, to see that all is there")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin no shape after so many")
    parser.add_argument("--out", type=Path, default=RUNS / f"{question}.json", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.dry_run:
        shapes = [shape for shape in TINIES if _decodes(shape) == _decodes(shapes[0])]
    chosen = [SHAPES[name] for name in options.shape] if options.shape else list(shapes)
    peers = options.peer or default_peers(default_device())

    given = sys.argv[1:] if arguments is None else arguments
    started = time.perf_counter()
    results, ceilings = begin(question, options.out, given)
    if default_device() == "cuda":
        compile_ahead(chosen, [peer for peer in peers if peer in COMPILED])
    for shape in tqdm(chosen, unit="shape", disable=None):
        if time.perf_counter() - started > options.budget_seconds:
            results.fail(shape.name, "left out: the time was spent")
            continue
        turns = REHEARSED if options.dry_run else QUICK if options.quick else TURNS
        try:
            entry = in_a_process(measure, shape, peers, default_device(), ceilings, turns=turns, peaks=PEAKS)
        except Exception as error:  # a process that died; the others go on
            results.fail(shape.name, first_line(error))
            continue
        results.add(shape.name, entry)
        tqdm.write(f"\n{tables.attention(entry)}")
        sys.stdout.flush()
    for name, reason in results.document["errors"].items():
        print(f"\n{name}: {reason}")
    return 1 if results.document["errors"] else 0


def begin(question: str, out: Path, arguments: Sequence[str]) -> tuple[Results, Ceilings]:
    """The file, with the device's ceilings in it; and a heading on the screen."""
    device = default_device()
    ceilings = in_a_process(measured_ceilings, torch.device(device))
    results = Results(question, out, device, arguments, ceilings=asdict(ceilings))
    print(results.heading())
    print(
        f"ceilings: {ceilings.flops / 1e12:.2f} TFLOP/s, copying {ceilings.copied / 1e12:.3f} TB/s, "
        f"reading {ceilings.read / 1e12:.3f} TB/s",
        flush=True,
    )
    return results, ceilings


def compile_ahead(shapes: Sequence[Shape], peers: Sequence[str]) -> None:
    """Fills the compiler's caches on disk, by several processes, since one shape after the other takes minutes."""
    started = time.perf_counter()
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        list(pool.map(compile_peers, shapes, [peers] * len(shapes)))
    print(f"compiled {', '.join(peers)} in {time.perf_counter() - started:.0f} s", flush=True)


def compile_peers(shape: Shape, peers: Sequence[str]) -> None:
    """Runs each once; who fails does so again when it is measured, and is reported then."""
    x = inputs(shape, dtype=default_dtype("cuda"), device="cuda")
    for peer in peers:
        with suppress(Exception):
            prepared = prepare(PEERS[peer], shape, x, training=shape.trained)
            prepared.step(x.d_output) if shape.trained else prepared.forward()


def default_peers(device: str) -> list[str]:
    """All there are, but for those that no CPU has."""
    left_out = IN_INGREDIENTS if device == "cuda" else IN_INGREDIENTS + ONLY_ON_A_GPU
    return [name for name in PEERS if not any(part in name for part in left_out)]


def _all_shapes() -> Sequence[Shape]:
    return GPU if default_device() == "cuda" else CPU


def _decodes(shape: Shape) -> bool:
    return not shape.trained


if __name__ == "__main__":
    sys.exit(main())
