"""The operator beside its peers, shape by shape: forward, backward and both, of one layer.

    python -m qtuning_fast.bench.rows.attention                          all shapes for this device, all peers
    python -m qtuning_fast.bench.rows.attention --shape bert-base llama-8b --peer fused flex sdpa --quick
    python -m qtuning_fast.bench.rows.attention --decode                 one new token for each of many sequences

In training, query, key, value, the prefix, U, V, alpha and tau all get gradients. What belongs to the prefix is
float32, the rest bfloat16 (float32 on a CPU). Before a peer is timed, its output and its gradients are compared with a
float64 reference on part of the batch. A peer without a gate computes less: it is compared with what it computes, and
shows what a gate costs. The table gives milliseconds a call, on a GPU by graph replay (and by the host's clock in
column eager), the ratio to ours, the roofline as a share of the time, the memory of a step, and the largest errors.

In decoding, the sequences share a prefix or use several in no order. The peer to beat is `sdpa-no-concat`: PyTorch's
attention, without a gate, whose cache already holds the prefix in front of every context.
"""

import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtuning_fast.bench.measure import (
    TURNS,
    SideBySide,
    as_json,
    broken,
    default_device,
    default_dtype,
    described,
    in_a_process,
)
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.plans import durations
from qtuning_fast.bench.plans.durations import IN_TURNS
from qtuning_fast.bench.plans.schedule import DONE, RESTART, Schedule
from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.results import device_folder
from qtuning_fast.bench.rows import tables
from qtuning_fast.bench.rows.command import Command, measure_each, turns_of
from qtuning_fast.bench.rows.roofline import Ceilings, measured_ceilings, of_passes
from qtuning_fast.bench.shapes import CPU, GPU, SHAPES, TINIES, Shape
from qtuning_fast.bench.timing import Turns, first_line

ONLY_ON_A_GPU = ("fused", "cudnn", "flash", "efficient", "flex-approx")
IN_INGREDIENTS = ("-no-gate", "-no-reweighting")  # measured there
# Whose memory is measured.
PEAKS = ("fused", "native", "composed", "composed-plain", "reference", "eager", "flex-frozen-gate", "sdpa")


def measure(
    shape: Shape,
    peers: Sequence[str],
    device: str,
    ceilings: Ceilings | None,
    *,
    turns: Turns = TURNS,
    peaks: Collection[str] | None = PEAKS,
    schedule: Schedule | None = None,
    known: Mapping[str, Any] | None = None,
    wrote: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measures peers beside each other on one shape, as far as there is time.

    Args:
        ceilings: of the device; None: there is no roofline.
        peaks: the peers whose memory is measured; None: all.
        schedule: what it has no time for is left out.
        known: the entry as an earlier process left it.
        wrote: gets the entry after each row, in which a peer was timed alone until all take turns.

    Returns the entry of the file of results.
    """
    started, dtype = time.perf_counter(), default_dtype(device)
    schedule = schedule or Schedule()
    side = SideBySide({peer: (shape, peer) for peer in peers}, device, dtype, turns)
    before, asked = dict((known or {}).get("rows", {})), set[str]()
    entry = described(shape, device, dtype) | predicted(shape, device)
    entry |= of_passes(shape, dtype.itemsize, ceilings) if ceilings is not None else {}

    def by_now() -> dict[str, Any]:
        rows = before | as_json({peer: row for peer, row in side.rows.items() if peer in asked and peer not in before})
        return entry | {"rows": rows, "seconds": round(time.perf_counter() - started, 1)}

    for unit in durations.rows(shape, peers, turns, peaks):
        if unit.kind == "turns" and not side.ready:
            continue
        peer, begins = unit.of, schedule.may_begin(unit.name, unit.seconds, unit.reserve)
        if unit.kind == "row":
            asked.add(peer)
            if begins:
                before.pop(peer, None)
                side.check(peer, alone=wrote is not None)
            elif peer not in before:
                side.rows[peer].error = schedule.status(unit.name)
        elif unit.kind == "turns" and begins:
            side.take_turns()
        elif unit.kind == "memory" and begins and peer not in before:
            side.measure_peak(peer)
        if wrote is not None:
            wrote(by_now())
        if broken(device):
            raise SystemExit(RESTART)
    schedule.end()
    return by_now()


def predicted(shape: Shape, device: str) -> dict[str, Any]:
    """What was predicted of "fused" for this GPU and this shape; empty: nothing was."""
    if torch.device(device).type != "cuda":
        return {}
    gpu = device_folder({"type": "cuda", "name": torch.cuda.get_device_name()})
    ms = durations.predicted_ms(shape.name, gpu)
    return {"predicted_ms": {"fused": ms}} if ms else {}


def command(name: str = "attention") -> Command:
    """The command line, whose results are called `name`."""
    found = Command(__spec__.name, __doc__, name, quick=True, deadline=True)
    found.add_argument("--decode", action="store_true", help="shapes of decoding, in place of those of training")
    found.add_argument("--shape", nargs="+", choices=SHAPES, metavar="NAME", help=f"of {', '.join(SHAPES)}")
    found.add_argument("--peer", nargs="+", choices=PEERS, metavar="NAME", help=f"of {', '.join(PEERS)}")
    found.add_argument("--ceilings", type=Path, metavar="FILE", help="the ceilings of rows.roofline; else measure them")
    found.add_argument("--rest-of", type=Path, metavar="FILE", help="leave out what this file of an earlier run holds")
    return found


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    line = command("decode" if "--decode" in given else "attention")
    options, device = line.parse(given), default_device()
    usual = TINIES if options.dry_run else GPU if device == "cuda" else CPU
    chosen = [SHAPES[name] for name in options.shape or ()] or [s for s in usual if s.trained != options.decode]
    peers = options.peer or default_peers(device)

    settle()
    ceilings, status = ceilings_of(options.ceilings, device)
    results = line.results(options, device, ceilings=ceilings and asdict(ceilings))
    print(f"ceilings: {status}", flush=True)
    peaks, home = () if options.dry_run else PEAKS, at_home(options.rest_of)
    one = partial(measure, device=device, ceilings=ceilings, turns=turns_of(options), peaks=peaks)
    names = most_missing_first([shape.name for shape in chosen], home)
    jobs = {name: partial(one, SHAPES[name], peers) for name in names if is_missing(name, peers, home)}
    return measure_each(results, jobs, tables.attention, options.deadline)


def is_missing(shape: str, peers: Sequence[str], home: Collection[str]) -> bool:
    """Whether a shape is to be measured: all of it if a row or the turns are missing.

    Times of peers that did not take turns do not compare.
    """
    return any(f"{shape}: {unit}" not in home for unit in (*peers, IN_TURNS))


def most_missing_first(shapes: Sequence[str], home: Collection[str]) -> list[str]:
    """Shapes whose peers have not taken turns, then those that lack a row, each in their order."""
    return sorted(shapes, key=lambda shape: f"{shape}: {IN_TURNS}" in home)


def at_home(earlier: Path | None) -> set[str]:
    """The units that an earlier run has finished; none if its file does not exist."""
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


def ceilings_of(known: Path | None, device: str) -> tuple[Ceilings | None, str]:
    """The device's ceilings, from the file of an earlier step or measured now, and how to print them.

    None if they cannot be measured: rows without a roofline are still worth having.
    """
    found = json.loads(known.read_text()).get("ceilings") if known is not None and known.exists() else None
    try:
        ceilings = Ceilings(**found) if found else in_a_process(measured_ceilings, torch.device(device))
    except Exception as error:
        return None, f"not measured, {first_line(error)}"
    return ceilings, str(ceilings)


def default_peers(device: str) -> list[str]:
    """All peers, without those that only a GPU has if this is none."""
    left_out = IN_INGREDIENTS + (("native",) if device == "cuda" else ONLY_ON_A_GPU)
    return [name for name in PEERS if not any(part in name for part in left_out)]


if __name__ == "__main__":
    sys.exit(main())
