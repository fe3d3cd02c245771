"""The operator beside its peers, shape by shape: forward, backward and both, of one layer.

    python -m qtuning_fast.bench.rows.attention                          all shapes for the device at hand, all peers
    python -m qtuning_fast.bench.rows.attention --shape bert-base llama-8b --peer fused flex sdpa --quick

In training query, key, value, the prefix, U, V, alpha and tau are all trained; what belongs to the prefix is float32,
the rest bfloat16 (float32 on a CPU). Before a peer is timed its output and its gradients are compared with a float64
reference on part of the batch. Peers without a gate compute less: they are compared with what they compute, and show
what a gate costs. The table gives milliseconds a call, on a GPU by graph replay (and by the host's clock, column
eager), the ratio to ours, the fraction of the floor, the memory that a step takes, and the largest errors of output and
gradients.
"""

import argparse
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from qtuning_fast.bench import tables
from qtuning_fast.bench.durations import IN_TURNS
from qtuning_fast.bench.measure import (
    QUICK,
    REHEARSED,
    TURNS,
    default_device,
    in_a_process,
    measure,
    measure_each,
    scheduled,
)
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.results import RUNS, Results
from qtuning_fast.bench.roofline import Ceilings, measured_ceilings
from qtuning_fast.bench.schedule import DONE
from qtuning_fast.bench.shapes import CPU, GPU, SHAPES, TINIES
from qtuning_fast.bench.timing import first_line

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


def main(arguments: list[str] | None = None) -> int:
    return ask("attention", __doc__, arguments, trained=True)


def parser(question: str, about: str | None) -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, metavar="NAME", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--peer", nargs="+", choices=PEERS, metavar="NAME", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--quick", action="store_true", help=f"at most {QUICK.rounds} rounds, not {TURNS.rounds}")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, to see that all is there")
    parser.add_argument("--deadline", type=float, help="leave out what would end later, by time.monotonic()")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="what bench.floors measured, or measure it now")
    parser.add_argument("--rest-of", type=Path, metavar="FILE", help="leave out what this file of an earlier run holds")
    parser.add_argument("--out", type=Path, default=RUNS / f"{question}.json", metavar="FILE")
    return parser


def ask(question: str, about: str | None, arguments: list[str] | None, *, trained: bool) -> int:
    """Measures shapes, those that are trained or the others, and writes and prints what comes of it."""
    options = parser(question, about).parse_args(arguments)
    usual = TINIES if options.dry_run else GPU if default_device() == "cuda" else CPU
    chosen = [SHAPES[name] for name in options.shape or ()] or [shape for shape in usual if shape.trained == trained]
    peers = options.peer or default_peers(default_device())

    settle()
    given = sys.argv[1:] if arguments is None else arguments
    within = options.deadline is not None  # a plan: one process, which leaves out what there is no time for
    results, ceilings = begin(question, options.out, given, options.ceilings, going_on=within)
    peaks = () if options.dry_run else PEAKS
    turns = REHEARSED if options.dry_run else QUICK if options.quick else TURNS
    one = partial(measure, device=default_device(), ceilings=ceilings, turns=turns, peaks=peaks)
    home = at_home(options.rest_of)
    names = most_missing_first([shape.name for shape in chosen], home)
    jobs = {name: partial(one, SHAPES[name], peers) for name in names if is_missing(name, peers, home)}
    if within:
        jobs = scheduled(jobs, results, options.deadline)
    return measure_each(results, jobs, tables.attention, each_apart=not within)


def is_missing(shape: str, peers: Sequence[str], home: Collection[str]) -> bool:
    """Whether a shape is to be measured: all of it again, if only a row or the turns are missing.

    Times of peers that did not take turns do not compare.
    """
    return any(f"{shape}: {unit}" not in home for unit in (*peers, IN_TURNS))


def most_missing_first(shapes: Sequence[str], home: Collection[str]) -> list[str]:
    """Those whose peers have not taken turns before those that lack a row; else as they are."""
    return sorted(shapes, key=lambda shape: f"{shape}: {IN_TURNS}" in home)


def at_home(earlier: Path | None) -> set[str]:
    """The units that an earlier run has brought home; none where its file is not there."""
    if earlier is None or not earlier.exists():
        return set()
    document = json.loads(earlier.read_text())
    alone = {
        f"{shape}: {peer}"
        for shape, entry in document["entries"].items()
        for peer, row in entry["rows"].items()
        if not row.get("turns") and not row["error"]  # its process died before it took turns with the others
    }
    return {name for name, entry in document["units"].items() if entry["status"] == DONE} - alone


def begin(
    question: str, out: Path, arguments: Sequence[str], known: Path | None = None, *, going_on: bool = False
) -> tuple[Results, Ceilings | None]:
    """The file, with the device's ceilings in it, and a heading on the screen.

    None where the ceilings cannot be measured: rows without floors are worth having.
    """
    device, ceilings, status = default_device(), known_ceilings(known), ""
    if ceilings is None:
        try:
            ceilings = in_a_process(measured_ceilings, torch.device(device))
        except Exception as error:
            status = f"not measured, {first_line(error)}"
    if ceilings is not None:
        rates = f"copying {ceilings.copied / 1e12:.3f} TB/s, reading {ceilings.read / 1e12:.3f} TB/s"
        status = f"{ceilings.flops / 1e12:.2f} TFLOP/s, {rates}"
    found = None if ceilings is None else asdict(ceilings)
    results = Results(question, out, device, arguments, going_on=going_on, ceilings=found)
    print(f"{results.heading()}\nceilings: {status}", flush=True)
    return results, ceilings


def known_ceilings(known: Path | None) -> Ceilings | None:
    """What a step before this one has measured; None where it has not, or was cut off before it had."""
    if known is None or not known.exists():
        return None
    found = json.loads(known.read_text()).get("ceilings")
    return Ceilings(**found) if found else None


def default_peers(device: str) -> list[str]:
    """All there are, but for those that no CPU has."""
    left_out = IN_INGREDIENTS if device == "cuda" else IN_INGREDIENTS + ONLY_ON_A_GPU
    return [name for name in PEERS if not any(part in name for part in left_out)]


if __name__ == "__main__":
    sys.exit(main())
