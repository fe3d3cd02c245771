"""Measures block sizes of the attention kernels on the GPU at hand, and writes the best into kernels/blocks.json.

    python -m qtuning_fast.bench.tune                                       bfloat16, all head sizes and directions
    python -m qtuning_fast.bench.tune --head-size 64 --direction keys --dry-run --out tuning.json

Candidates are compiled first, by several processes; those that spill too many registers or want too much
shared memory are dropped. Each of the others must reproduce what the incumbent computes, and is then timed, by
CUDA-graph replay, on shapes of models in use. The winner has the least geometric mean over the shapes; the incumbent
stays unless it is beaten by more than noise. Table and FILE are written after each head size and direction: a run that
is cut off counts as far as it got.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtuning_fast.bench import shapes
from qtuning_fast.bench.candidates import candidates, compile_for, obstacle
from qtuning_fast.bench.compile_report import TARGETS
from qtuning_fast.bench.measure import default_device
from qtuning_fast.bench.results import RUNS, Results
from qtuning_fast.bench.shapes import BERT_BASE, BERT_BASE_512, LLAMA_8B, MINILM, TINY, VIT_B16, WIDE, Inputs, Shape
from qtuning_fast.bench.timing import Call, Timing, compare, first_line, sets_for
from qtuning_fast.kernels import backward, blocks, forward, prefix_forward, prefix_part
from qtuning_fast.kernels.blocks import DEFAULT, DIRECTIONS, Blocks, blocks_for, instead
from qtuning_fast.kernels.fold import folded
from qtuning_fast.kernels.launch import Launch
from qtuning_fast.kernels.target import INTERPRETED, current_target

SHAPES: dict[int, tuple[Shape, ...]] = {  # by head size, the most used first
    64: (BERT_BASE, BERT_BASE_512, VIT_B16),
    32: (MINILM,),
    128: (LLAMA_8B,),
    256: (WIDE,),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # entries for bfloat16 are those for all 16-bit types
TOLERANCE = {2: 2**-6, 4: 1e-4}  # by bytes of an element; what another order of sums changes stays well below
NOISE = 0.01  # by how much the incumbent must be beaten
ROUNDS = 15
SHOWN = 6


class Job(NamedTuple):
    """What one entry of the table is for."""

    dtype: str
    head_size: int
    direction: str

    def __str__(self) -> str:
        return f"{self.dtype} D{self.head_size} {self.direction}"


@dataclass
class Trial:
    """One candidate. With an error it is out of the running."""

    entry: Blocks
    resources: dict[str, Any] = field(default_factory=dict)
    times: dict[str, Timing] = field(default_factory=dict)  # by shape
    error: str = ""

    def mean(self) -> float:
        """The geometric mean over the shapes, in milliseconds; infinite when there is none."""
        if self.error or not self.times:
            return math.inf
        return statistics.geometric_mean(timing.median for timing in self.times.values())

    def name(self) -> str:
        e = self.entry
        return f"{e.queries}x{e.keys}x{e.prefix} w{e.warps} s{e.stages}"


class Pass:
    """One direction on one set of inputs: what goes before it is computed, and what it computes has room.

    Of the two directions that only see the prefix, "merge" and "prefix-queries", the results are what they are given,
    with something added: they start at 0, as attention to a context of one key with a value of 0.
    """

    def __init__(self, shape: Shape, x: Inputs, direction: str) -> None:
        self.direction, self.d_output = direction, x.d_output
        self.call = x.call(shape)
        self.as_seen, folding = folded(self.call)
        self.outputs = forward.empty_outputs(self.call)
        self.gradients = backward.empty_gradients(self.call, [True] * len(backward.INPUTS))
        for launch in (*folding, forward.launch(self.as_seen, *self.outputs)):
            launch.run()

    def launches(self, entry: Blocks) -> list[Launch]:
        """What is timed. With the keys goes the launch after them: how much it has to add up is up to their blocks."""
        with instead(entry):
            if self.direction == "forward":
                return [forward.launch(self.as_seen, *self.outputs)]
            if self.direction == "merge":
                return [prefix_forward.launch(self.as_seen, *self.outputs)]
            if self.direction == "prefix-queries":
                d_query = self.gradients["query"]
                launches = prefix_part.launches(self.call, *self.outputs, self.d_output, d_query, gradients={})
            else:
                launches = backward.launches(self.call, *self.outputs, self.d_output, self.gradients)
            folding, queries, *others = launches
        folding.run()
        if self.direction in ("queries", "prefix-queries"):
            return [queries]
        queries.run()  # writes the delta that the others read
        return others

    def results(self, launches: Sequence[Launch]) -> dict[str, Tensor]:
        """What the launches write."""
        if self.direction in ("forward", "merge"):
            return {"output": self.outputs[0], "lse": self.outputs[1]}
        if self.direction in ("queries", "prefix-queries"):
            return {"delta": launches[0].arguments["per_query"].delta, "query": self.gradients["query"]}
        return {name: x for name, x in self.gradients.items() if name != "query"}

    def compute(self, entry: Blocks) -> dict[str, Tensor]:
        """The results by an entry. What it does not write is NaN, or 0 where it adds to what is there."""
        launches = self.launches(entry)
        results = self.results(launches)
        parts = [x for x in launches[0].arguments.get("parts") or () if isinstance(x, Tensor)]
        for x in (*results.values(), *parts):
            x.fill_(0.0 if self.direction in ("merge", "prefix-queries") else math.nan)
        for launch in launches:
            launch.run()
        return {name: x.clone() for name, x in results.items()}


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest ‖found − expected‖ / ‖expected‖, and whose it is; NaN counts as infinite."""
    ratios = {}
    for name, x in expected.items():
        ratio = ((found[name].float() - x.float()).norm() / x.float().norm()).item()
        ratios[name] = math.inf if math.isnan(ratio) else ratio
    worst = max(ratios, key=ratios.__getitem__)
    return ratios[worst], worst


def measure(trials: Sequence[Trial], shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int) -> None:
    """Checks the trials against the first, the incumbent, and times them on one shape."""
    incumbent = trials[0].entry
    count = sets_for(shapes.inputs(shape, dtype=dtype, device="meta").nbytes, device)
    passes = [Pass(shape, x, incumbent.direction) for x in shapes.input_sets(shape, count, dtype=dtype, device=device)]
    expected = passes[0].compute(incumbent)

    setups: dict[str, Callable[[], list[Call]]] = {}
    for trial in trials:
        if trial.error:
            continue
        try:
            ratio, name = difference(passes[0].compute(trial.entry), expected)
        except Exception as error:  # the others go on
            trial.error = first_line(error)
            continue
        if ratio > TOLERANCE[incumbent.element_size]:
            trial.error = f"wrong: {name} is off by {ratio:.2g} on {shape.name}"
            continue
        setups[trial.name()] = partial(_calls, passes, trial.entry)
    times = compare(setups, device=device, rounds=rounds, eager=False)
    for trial in trials:
        if not trial.error:
            found = times[trial.name()]
            trial.error = found.error or found.graph_error
            if found.best is not None:
                trial.times[shape.name] = found.best


def _calls(passes: Sequence[Pass], entry: Blocks) -> list[Call]:
    return [partial(_run, one.launches(entry)) for one in passes]


def _run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.run()


def winner(trials: Sequence[Trial]) -> Trial | None:
    """The fastest; the first, the incumbent, unless it is beaten by more than noise. None: nothing ran."""
    best = min(trials, key=Trial.mean)
    if best.mean() == math.inf:
        return None
    return best if best.mean() < trials[0].mean() * (1 - NOISE) else trials[0]


def with_entry(entries: Sequence[Blocks], entry: Blocks) -> list[Blocks]:
    """A table with an entry in its place.

    A target that has none yet gets all the default ones as well: else this one would serve smaller heads, too.
    """
    if not any(e.target == entry.target for e in entries):
        entries = [*entries, *(replace(e, target=entry.target, measured="") for e in entries if e.target == DEFAULT)]
    return [e for e in entries if _place(e) != _place(entry)] + [entry]


def _place(entry: Blocks) -> tuple[Any, ...]:
    return entry.target, entry.element_size, entry.head_size, entry.direction


def report(job: Job, trials: Sequence[Trial], best: Trial | None) -> str:
    """The fastest candidates, and the incumbent, as text of at most 120 columns."""
    timed = sorted((t for t in trials if t.mean() < math.inf), key=Trial.mean)
    spilled = sum(t.error.startswith("spills") for t in trials)
    wrong = [t for t in trials if t.error.startswith("wrong")]
    others = len(trials) - len(timed) - spilled - len(wrong)
    lines = [f"{job}: {len(timed)} timed, {spilled} spill, {len(wrong)} wrong, {others} otherwise out"]
    names = list(timed[0].times) if timed else []
    title = f"  {'queries x keys x prefix':<24}{'regs':>5}{'shared':>8}{'mean ms':>9}{'gain':>8}"
    lines.append(title + "".join(f"{name:>15}" for name in names) + f"{'±iqr':>8}")
    shown = timed[:SHOWN] + [t for t in timed[SHOWN:] if t is trials[0]]
    for trial in shown:
        gain = trials[0].mean() / trial.mean() - 1
        mark = "*" if trial is best else " "
        cells = (
            f"{mark} {trial.name():<24}{trial.resources.get('registers', 0):>5}{trial.resources.get('shared', 0):>8}"
        )
        cells += f"{trial.mean():>9.4f}{'' if math.isinf(gain) else f'{gain:+.1%}':>8}"
        cells += "".join(f"{trial.times[name].median:>15.4f}" for name in names)
        cells += f"{max(t.spread for t in trial.times.values()):>8.4f}"
        lines.append(cells + (" incumbent" if trial is trials[0] else ""))
    lines.extend(f"  {t.name()}: {t.error}"[:120] for t in wrong)
    if trials[0].error:
        lines.append(f"  the incumbent, {trials[0].name()}: {trials[0].error}"[:120])
    return "\n".join(lines)


def as_json(job: Job, trials: Sequence[Trial], best: Trial | None) -> dict[str, Any]:
    return {
        **job._asdict(),
        "winner": best and asdict(best.entry),
        "gain": best and trials[0].mean() < math.inf and trials[0].mean() / best.mean() - 1,
        "trials": [asdict(t) | {"mean": None if t.mean() == math.inf else t.mean()} for t in trials],
    }


def incumbent_of(target: str, job: Job) -> Blocks:
    """What the table has for a job, as an entry for this target and head size."""
    found = blocks_for(target, DTYPES[job.dtype].itemsize, job.head_size, job.direction)
    return replace(found, target=target, head_size=job.head_size, measured="")


def tune(
    jobs: Sequence[Job],
    compiling: Callable[..., Future[dict[str, Any]]],
    *,
    target: str,
    device: torch.device,
    budget_seconds: float,
    finished: Callable[[Job, list[Trial], Trial | None], None],
    rounds: int = ROUNDS,
    tried: Callable[[Blocks], list[Blocks]] = candidates,
    measured_on: Mapping[int, tuple[Shape, ...]] = SHAPES,
) -> list[Job]:
    """Measures job after job, hands each to `finished`, and returns those for which no time was left."""
    end = time.monotonic() + budget_seconds
    work = []
    for job in jobs:
        trials = [Trial(entry) for entry in tried(incumbent_of(target, job))]
        on = measured_on[job.head_size]
        work.append((job, trials, [compiling(compile_for, target, DTYPES[job.dtype], t.entry, on) for t in trials]))
    for i, (job, trials, futures) in enumerate(work):
        for trial, future in zip(trials, futures):
            try:
                trial.resources = future.result(timeout=max(0.0, end - time.monotonic()))
                trial.error = obstacle(trial.entry, trial.resources, trials[0].resources)
            except Exception as error:  # no time left, or the compiler took its process with it
                trial.error = first_line(error)
        if time.monotonic() > end:
            return [job for job, _, _ in work[i:]]
        if trials[0].error:  # the others are measured against it: where it does not compile, no verdict counts
            for trial in trials:
                trial.error = ""
        for shape in measured_on[job.head_size]:
            try:
                measure(trials, shape, DTYPES[job.dtype], device, rounds)
            except Exception as error:  # the incumbent itself does not run
                for trial in trials:
                    trial.error = trial.error or first_line(error)
        finished(job, trials, winner(trials))
    return []


def rehearse(finished: Callable[[Job, list[Trial], Trial | None], None]) -> list[Job]:
    """One job on a tiny shape in Triton's interpreter, with one candidate beside the incumbent; nothing is compiled."""

    def not_compiled(*_: Any) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        future.set_result({"registers": 0, "spilled": 0, "shared": 0})
        return future

    return tune(
        [Job("fp32", 32, "forward")],
        not_compiled,
        target="sm_90",
        device=torch.device("cpu"),
        budget_seconds=math.inf,
        finished=finished,
        rounds=2,
        tried=lambda incumbent: candidates(incumbent)[:2],
        measured_on={32: (replace(TINY, B=1, D=32),)},
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-size", nargs="+", type=int, choices=SHAPES, default=list(SHAPES), metavar="D")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="begin nothing new after so many")
    parser.add_argument("--out", type=Path, default=RUNS / "tuning.json", metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="leave kernels/blocks.json as it is")
    options = parser.parse_args(arguments)
    rehearsed = options.dry_run and INTERPRETED
    if not rehearsed and (not torch.cuda.is_available() or INTERPRETED):
        parser.error("it takes a GPU, and TRITON_INTERPRET not set; set and with --dry-run it rehearses")
    target = "sm_90" if rehearsed else current_target()
    if target not in TARGETS:
        parser.error(f"this GPU is {target}; known are {', '.join(TARGETS)}: see TARGETS in bench/compile_report.py")

    given = sys.argv[1:] if arguments is None else arguments
    results = Results("tune", options.out, default_device(), given, target=target, rounds=ROUNDS, left_out=[])
    measured = results.measured()

    def finished(job: Job, trials: list[Trial], best: Trial | None) -> None:
        print(f"\n{report(job, trials, best)}", flush=True)
        results.add(str(job), as_json(job, trials, best))
        if best is not None and not options.dry_run:
            blocks.write(with_entry(blocks.table(), replace(best.entry, measured=measured)))

    if rehearsed:
        rehearse(finished)
        return 0
    jobs = [Job(*job) for job in _product(options.dtype, options.head_size, options.direction)]
    print(f"{measured}, {target}; gain over the incumbent, ms a launch by CUDA-graph replay, * wins")
    spawn = multiprocessing.get_context("spawn")  # a process that was forked has no CUDA
    pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=spawn)
    try:
        left_out = tune(
            jobs,
            pool.submit,
            target=target,
            device=torch.device("cuda"),
            budget_seconds=options.budget_seconds,
            finished=finished,
        )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    results.document["left_out"] = [str(job) for job in left_out]
    results.write()
    print(f"\nno time left for: {', '.join(map(str, left_out))}" if left_out else "\nall measured")
    return 0


def _product(dtypes: Sequence[str], head_sizes: Sequence[int], directions: Sequence[str]) -> list[tuple[Any, ...]]:
    return [(dtype, D, direction) for dtype in dtypes for D in head_sizes for direction in directions]


if __name__ == "__main__":
    sys.exit(main())
