"""The seconds that the units of a plan are expected to take on an H100; plans leave room by them.

Kernel times come from `bench/results/predicted` where it has them, else from ESTIMATES. Everything else is counted in
seconds of the host: processes that start, compilers, calls of Python. Each figure names its source; those marked
"assumed" were never measured. A schedule stretches what it expects by what its units have taken so far.
"""

import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

from qtuning_fast.bench.plans.schedule import Unit
from qtuning_fast.bench.results import ROOT
from qtuning_fast.bench.shapes import Shape
from qtuning_fast.bench.timing import FEWEST_ROUNDS, MOST_SETS, Turns
from qtuning_fast.kernels.blocks import Blocks

PREDICTED = ROOT / "bench/results/predicted"  # written by bench.predictions.predict
ENTRY = ("target", "element_size", "head_size", "direction", "queries", "keys", "prefix", "warps", "stages")
# Milliseconds of a training step of "fused", read off its sm_90 code by hand; of decoding, bytes over 3 TB/s.
ESTIMATES = {"bert-base": 0.075, "bert-base-512": 0.245, "vit-b16": 0.55, "llama-8b": 2.1, "minilm": 0.075}
ESTIMATES |= {"llama-8b-4096": 7.0, "long": 26.0, "decode-64": 0.1, "decode-64-mixed": 0.13}
# How many times as long as "fused": assumed.
OVER_FUSED = {"composed": 1.5, "flex": 8.0, "flex-merged": 2.0, "eager": 8.0, "reference": 12.0, "sdpa": 1.0}

IMPORTS = 3.2  # seconds of torch, triton and this package; measured on a core of a virtual machine
CONTEXT = 1.5  # of a first CUDA context and of setting up cuBLAS; assumed
COMPILED = json.loads((ROOT / "bench/results/compile/seconds.json").read_text())["each"]
# To compile one of our kernels for sm_90, and its launcher, on one core; measured by bench.plans.triton_cache.
KERNEL, LAUNCHER = (statistics.mean(took[what] for took in COMPILED.values()) for what in ("kernel", "launcher"))
FLEX, FLEX_AGAIN = 35.0, 8.0  # seconds of FlexAttention's two passes under torch.compile, first and from disk; assumed
HOST_MS = 2.0  # of a step in Python, where the GPU is faster; measured 1.0, on this machine
CHECK = 0.3  # seconds of a peer's outputs and gradients beside float64; assumed
PEAK = 0.5  # seconds of a step whose memory is counted; assumed
IN_TURNS = "in turns"  # the unit of a shape in which its peers take turns
SETS_BYTES = 150e6  # the sets of inputs together hold so much, three times the last cache


@cache
def _steps() -> dict[str, float]:
    """The milliseconds of all kernels of our step, one after the other, by shape."""
    found: dict[str, float] = {}
    for row in _rows("h100.json"):
        found[row["shape"]] = found.get(row["shape"], 0.0) + row["microseconds"] / 1e3
    return found


@cache
def _candidates() -> dict[tuple[Any, ...], float]:
    """The milliseconds of candidates, by the fields of an entry of the table of blocks."""
    return {tuple(row[name] for name in ENTRY): row["microseconds"] / 1e3 for row in _rows("h100-candidates.json")}


def _rows(name: str) -> list[dict[str, Any]]:
    path = PREDICTED / name
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row.get("microseconds") and not row.get("error")]


def step_ms(shape: Shape, peer: str = "fused") -> float:
    """The predicted milliseconds of a step, or of a forward pass if nothing is trained."""
    work = shape.rows * shape.Hq * (shape.P + shape.reach) * shape.D
    ms = _steps().get(shape.name) or ESTIMATES.get(shape.name) or work * 1e-9 * 0.4  # as bert-base has it
    return ms * next((factor for name, factor in OVER_FUSED.items() if peer.startswith(name)), 1.0)


def predicted_ms(shape: str, device: str) -> dict[str, float]:
    """The predicted milliseconds of "fused", forward and step, on a device ("h100"); empty: nothing is predicted."""
    found = [row for row in _rows(f"{device}.json") if row["shape"] == shape]
    names, ms = [row["kernel"] for row in found], [row["microseconds"] / 1e3 for row in found]
    if "forward" not in names:
        return {}
    return {"forward": sum(ms[: names.index("forward") + 1]), "step": sum(ms)}


def rows(shape: Shape, peers: Sequence[str], turns: Turns, peaks: Collection[str] | None) -> list[Unit]:
    """The units of one shape: each peer checked and timed alone, all peers in turns, the memory of those in `peaks`.

    A row begins only where the turns still fit after it, because rows that were timed alone do not compare. `peaks` is
    None for all peers.
    """
    found = [
        Unit(f"{shape.name}: {peer}", row_seconds(shape, peer), "row", peer, turns_seconds(shape, peers[:count], turns))
        for count, peer in enumerate(peers, start=1)
    ]
    found.append(Unit(f"{shape.name}: {IN_TURNS}", turns_seconds(shape, peers, turns), "turns"))
    asked = [peer for peer in peers if peaks is None or peer in peaks]
    return found + [Unit(f"{shape.name}: memory, {peer}", PEAK, "memory", peer) for peer in asked]


def heats(jobs: Mapping[str, tuple[int, Sequence[Shape]]], heat: int, rounds: int) -> list[Unit]:
    """The units of `tune`: a heat for each job before any has its second, then the best of each job again.

    `jobs` holds, by job, the number of candidates beside the incumbent, and the shapes. The subject of a unit is the
    job with the number of the heat.
    """
    most = max(max(1, math.ceil(count / heat)) for count, _ in jobs.values())
    found = [
        Unit(f"{job}: heat {number + 1}", heat_seconds(on, min(heat, count) + 2, rounds), "heat", (job, number))
        for number in range(most)
        for job, (count, on) in jobs.items()
        if number < max(1, math.ceil(count / heat))
    ]
    return found + [
        Unit(f"{job}: again", heat_seconds(on, 2, 2 * rounds), "again", (job, -1)) for job, (_, on) in jobs.items()
    ]


def row_seconds(shape: Shape, peer: str) -> float:
    """Seconds to load or compile a peer, to check it, and to time it alone."""
    loads = FLEX_AGAIN if peer.startswith(("flex", "eager-compiled")) else 0.5
    return loads + CHECK + 4 * _calls_seconds(shape, peer)


def turns_seconds(shape: Shape, peers: Sequence[str], turns: Turns) -> float:
    """Seconds in which all peers take turns, forward and step, by graph and by the host's clock."""
    rounds = min(turns.rounds, FEWEST_ROUNDS + 1) + 4  # and to warm up and capture
    return min(0.2 + sum(rounds * _calls_seconds(shape, peer) for peer in peers), 4 * turns.seconds)


def heat_seconds(on_shapes: Sequence[Shape], candidates: int, rounds: int) -> float:
    """Seconds of so many candidates of tuning beside each other, on each of the shapes."""
    return sum(0.3 + candidates * (0.1 + (rounds + 4) * _calls_seconds(shape, "fused") / 3) for shape in on_shapes)


def candidate_ms(entry: Blocks) -> float | None:
    """The predicted milliseconds of a candidate of tuning; None: nothing is predicted."""
    return _candidates().get(tuple(getattr(entry, name) for name in ENTRY))


def _calls_seconds(shape: Shape, peer: str) -> float:
    """Seconds of one call for each set of inputs, forward and step, by graph and eagerly."""
    element = 2 * shape.B * shape.D * (2 * shape.Hq * shape.N + 2 * shape.Hkv * shape.M)
    sets = min(math.ceil(SETS_BYTES / element), MOST_SETS)
    ms = step_ms(shape, peer) * (1.4 if shape.trained else 1.0)  # with a forward pass of its own
    return sets * (max(ms, 1e-3) + max(ms, HOST_MS * (1.4 if shape.trained else 0.5))) / 1e3
