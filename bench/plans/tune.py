"""Measures block sizes of the attention kernels on this GPU and writes the best into kernels/blocks.json.

    python -m qtuning_fast.bench.plans.tune                           bfloat16, all head sizes and directions
    python -m qtuning_fast.bench.plans.tune --head-size 64 --direction keys --dry-run --out tuning.json

Several processes compile the candidates; those that spill too many registers or need too much shared memory are
dropped. The others come in heats, the most promising first: each must reproduce what the incumbent computes, and is
then timed, by CUDA-graph replay, on shapes of models in use, beside the incumbent and the best so far. Every head size
and direction has its first heat before any has its second; in the end the best are timed once more. The winner has the
least geometric mean over the shapes; the incumbent stays unless it is beaten by more than noise. Table and FILE are
written after each heat: a run that is cut off counts as far as it got.
"""

import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from qtuning_fast.bench import shapes
from qtuning_fast.bench.measure import broken
from qtuning_fast.bench.plans.candidates import KEYS_OF_WHOLE, PREFIX_OF_WHOLE, candidates, compile_for, obstacle
from qtuning_fast.bench.plans.durations import candidate_ms, heats
from qtuning_fast.bench.plans.passes import Pass, difference
from qtuning_fast.bench.plans.schedule import DONE, RESTART, Schedule
from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.predictions.compile_report import TARGETS
from qtuning_fast.bench.rows.command import Command
from qtuning_fast.bench.shapes import BERT_BASE, BERT_BASE_512, LLAMA_8B, MINILM, TINY, VIT_B16, WIDE, Shape
from qtuning_fast.bench.timing import Call, Timing, compare, first_line, sets_for
from qtuning_fast.kernels import blocks
from qtuning_fast.kernels.blocks import DEFAULT, DIRECTIONS, Blocks, blocks_for
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
HEAT = 6  # candidates that are tried at once, beside the incumbent and the best so far
SHOWN = 6


class Job(NamedTuple):
    """What an entry of the table is for."""

    dtype: str
    head_size: int
    direction: str

    def __str__(self) -> str:
        return f"{self.dtype} D{self.head_size} {self.direction}"


@dataclass
class Trial:
    """One candidate. A candidate with an error cannot win."""

    entry: Blocks
    resources: dict[str, Any] = field(default_factory=dict)
    times: dict[str, Timing] = field(default_factory=dict)  # by shape
    error: str = ""

    def mean(self) -> float:
        """The geometric mean over the shapes, in milliseconds; infinite: not timed."""
        if self.error or not self.times:
            return math.inf
        return statistics.geometric_mean(timing.median for timing in self.times.values())

    def name(self) -> str:
        e = self.entry
        return f"{e.queries}x{e.keys}x{e.prefix} w{e.warps} s{e.stages}"


def measure(trials: Sequence[Trial], shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int) -> None:
    """Checks the trials against the first one, the incumbent, and times them on one shape."""
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


def shapes_of(head_size: int, direction: str) -> tuple[Shape, ...]:
    """The shapes on which an entry is measured; empty: no shape uses it."""
    if direction != "whole":
        return SHAPES[head_size]
    return tuple(s for s in SHAPES[head_size] if max(s.N, s.M) <= KEYS_OF_WHOLE and s.P <= PREFIX_OF_WHOLE)


def winner(trials: Sequence[Trial]) -> Trial | None:
    """The fastest trial; the incumbent, which is the first, unless it is beaten by more than noise. None: none ran."""
    best = min(trials, key=Trial.mean)
    if best.mean() == math.inf:
        return None
    return best if best.mean() < trials[0].mean() * (1 - NOISE) else trials[0]


def with_entry(entries: Sequence[Blocks], entry: Blocks) -> list[Blocks]:
    """The table with an entry in its place.

    A target without entries also gets all default entries; else this one would serve smaller heads too.
    """
    if not any(e.target == entry.target for e in entries):
        entries = [*entries, *(replace(e, target=entry.target, measured="") for e in entries if e.target == DEFAULT)]
    return [e for e in entries if _place(e) != _place(entry)] + [entry]


def _place(entry: Blocks) -> tuple[Any, ...]:
    return entry.target, entry.element_size, entry.head_size, entry.direction


def report(job: Job, trials: Sequence[Trial], best: Trial | None) -> str:
    """The fastest candidates and the incumbent, as text of at most 120 columns."""
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
    predicted = [f"{t.name()} {ms:.4f} ms" for t in shown if (ms := candidate_ms(t.entry)) is not None]
    lines.extend([f"  predicted mean: {', '.join(predicted)}"[:120]] if predicted else [])
    lines.extend(f"  {t.name()}: {t.error}"[:120] for t in wrong)
    if trials[0].error:
        lines.append(f"  the incumbent, {trials[0].name()}: {trials[0].error}"[:120])
    return "\n".join(lines)


def as_json(job: Job, trials: Sequence[Trial], best: Trial | None, before: Any = None) -> dict[str, Any]:
    """All trials as JSON, with those of an earlier process (`before`, its entry)."""
    own = [
        asdict(t) | {"mean": None if t.mean() == math.inf else t.mean(), "predicted": candidate_ms(t.entry)}
        for t in trials
    ]
    others = [t for t in (before or {}).get("trials", []) if t["entry"] not in [mine["entry"] for mine in own]]
    return {
        **job._asdict(),
        "winner": best and asdict(best.entry),
        "gain": best and trials[0].mean() < math.inf and trials[0].mean() / best.mean() - 1,
        "trials": [*own, *others],
    }


def incumbent_of(target: str, job: Job) -> Blocks:
    """The table's blocks for a job, as an entry for this target and head size."""
    found = blocks_for(target, DTYPES[job.dtype].itemsize, job.head_size, job.direction)
    return replace(found, target=target, head_size=job.head_size, measured="")


@dataclass
class Work:
    """One entry of the table: its trials, the most promising first, and the best so far."""

    job: Job
    trials: list[Trial]
    futures: list[Future[dict[str, Any]]]
    shapes: tuple[Shape, ...]
    best: Trial | None = None
    tried: int = 1  # of the trials; the first is the incumbent, which is in every heat

    def heat(self, number: int) -> list[Trial]:
        """The incumbent, the best so far, and the trials of this heat; -1: none."""
        new = self.trials[1 + number * HEAT : 1 + (number + 1) * HEAT] if number >= 0 else []
        best = [self.best] if self.best is not None else []
        return list({id(trial): trial for trial in (self.trials[0], *best, *new)}.values())


def tune(
    jobs: Sequence[Job],
    compiling: Callable[..., Future[dict[str, Any]]],
    *,
    target: str,
    device: torch.device,
    schedule: Schedule,
    finished: Callable[[Job, list[Trial], Trial | None], None],
    rounds: int = ROUNDS,
    tried: Callable[[Blocks], list[Blocks]] = candidates,
    measured_on: Callable[[int, str], tuple[Shape, ...]] = shapes_of,
    known: Mapping[str, Blocks] | None = None,
) -> None:
    """Measures heats of the jobs by turns and passes each on to `finished`; then the best of each job once more.

    `known` holds the best blocks by job that an earlier process has found.
    """
    work = []
    for job in jobs:
        incumbent = incumbent_of(target, job)
        entries = in_order(tried(incumbent))
        best = (known or {}).get(str(job), incumbent)
        trials = [Trial(entry) for entry in dict.fromkeys((*entries[:1], best, *entries[1:]))]
        on = measured_on(job.head_size, job.direction)
        work.append(Work(job, trials, [], on, best=trials[1] if best != incumbent else None))
    for rank in range(max(len(each.trials) for each in work)):
        for each in (one for one in work if rank < len(one.trials)):
            dtype, entry = DTYPES[each.job.dtype], each.trials[rank].entry
            each.futures.append(compiling(compile_for, target, dtype, entry, each.shapes))
    by_job = {str(each.job): each for each in work}
    sizes = {job: (len(each.trials) - 1, each.shapes) for job, each in by_job.items()}
    for unit in heats(sizes, HEAT, rounds):
        job, number = unit.of
        one, again = by_job[job], unit.kind == "again"
        if again and (one.best is None or one.best is one.trials[0]):
            continue  # nothing beats the incumbent
        if schedule.may_begin(unit.name, unit.seconds):
            _run_heat(one, one.heat(number), device, schedule.deadline, 2 * rounds if again else rounds)
            one.tried = one.tried if again else min(1 + (number + 1) * HEAT, len(one.trials))
            finished(one.job, one.trials[: one.tried], one.best)
    schedule.end()


def in_order(entries: Sequence[Blocks]) -> list[Blocks]:
    """The incumbent, then the others by predicted time; in their own order if nothing is predicted."""
    times = {entry: candidate_ms(entry) for entry in entries[1:]}
    return [entries[0], *sorted(entries[1:], key=lambda entry: math.inf if (ms := times[entry]) is None else ms)]


def _run_heat(work: Work, heat: list[Trial], device: torch.device, deadline: float, rounds: int) -> None:
    """Compares trials beside the incumbent and keeps the best."""
    incumbent = work.trials[0]
    for trial, future in zip(work.trials, work.futures):
        if trial.resources or not any(trial is each for each in heat):
            continue
        try:
            trial.resources = future.result(timeout=min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
        except Exception as error:  # no time left, or the compiler took its process with it
            trial.resources = {"error": first_line(error)}
        # The others are measured against the incumbent: where it does not compile, no verdict counts.
        if trial is not incumbent and not obstacle(incumbent.entry, incumbent.resources, incumbent.resources):
            trial.error = obstacle(trial.entry, trial.resources, incumbent.resources)
    for shape in work.shapes:
        try:
            measure(heat, shape, DTYPES[work.job.dtype], device, rounds)
        except Exception as error:  # the incumbent itself does not run
            for trial in heat:
                trial.error = trial.error or first_line(error)
    work.best = winner(heat)
    if broken(device.type):
        raise SystemExit(RESTART)


def rehearse(finished: Callable[[Job, list[Trial], Trial | None], None], schedule: Schedule) -> None:
    """Runs one job on a tiny shape in Triton's interpreter, with one candidate beside the incumbent and no compiler."""

    def not_compiled(*_: Any) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        future.set_result({"registers": 0, "spilled": 0, "shared": 0})
        return future

    tune(
        [Job("fp32", 32, "forward")],
        not_compiled,
        target="sm_90",
        device=torch.device("cpu"),
        schedule=schedule,
        finished=finished,
        rounds=2,
        tried=lambda incumbent: candidates(incumbent)[:2],
        measured_on=lambda head_size, direction: (replace(TINY, B=1, D=32),),
    )


def main(arguments: list[str] | None = None) -> int:
    line = Command(__spec__.name, __doc__, dry_run="leave kernels/blocks.json as it is", deadline=True)
    line.add_argument("--head-size", nargs="+", type=int, choices=SHAPES, default=list(SHAPES), metavar="D")
    line.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    line.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    options = line.parse(arguments)
    rehearsed = options.dry_run and INTERPRETED
    if not rehearsed and (not torch.cuda.is_available() or INTERPRETED):
        line.error("it takes a GPU, and TRITON_INTERPRET not set; set and with --dry-run it rehearses")
    settle()
    target = "sm_90" if rehearsed else current_target()
    if target not in TARGETS:
        line.error(f"this GPU is {target}; known are {', '.join(TARGETS)}: see TARGETS in bench/predictions")

    results = line.results(options, target=target, rounds=ROUNDS)
    schedule = Schedule.of(results, options.deadline)
    entries, measured = results.document["entries"], results.measured()

    def finished(job: Job, trials: list[Trial], best: Trial | None) -> None:
        print(f"\n{report(job, trials, best)}", flush=True)
        results.add(str(job), as_json(job, trials, best, entries.get(str(job))))
        if best is not None and not options.dry_run:
            blocks.write(with_entry(blocks.table(), replace(best.entry, measured=measured)))

    if rehearsed:
        rehearse(finished, schedule)
        return 0
    jobs = asked(options.dtype, options.head_size, options.direction)
    print(f"{measured}, {target}; gain over the incumbent, ms a launch by CUDA-graph replay, * wins")
    spawn = multiprocessing.get_context("spawn")  # a process that was forked has no CUDA
    pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=spawn, initializer=settle)
    try:
        known = {name: Blocks(**entry["winner"]) for name, entry in entries.items() if entry["winner"]}
        given = {"target": target, "device": torch.device("cuda"), "known": known}
        tune(jobs, pool.submit, schedule=schedule, finished=finished, **given)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    left_out = [unit for unit in schedule.log if schedule.status(unit) != DONE]
    print(f"\nno time left for: {', '.join(left_out)}" if left_out else "\nall measured")
    return 0


def asked(dtypes: Sequence[str], head_sizes: Sequence[int], directions: Sequence[str]) -> list[Job]:
    """The jobs, direction by direction as they are named, without those that no shape uses."""
    found = [Job(dtype, D, direction) for dtype in dtypes for direction in directions for D in head_sizes]
    return [job for job in found if shapes_of(job.head_size, job.direction)]


if __name__ == "__main__":
    sys.exit(main())
