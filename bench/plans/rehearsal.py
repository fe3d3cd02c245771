"""Rehearses a plan against a simulated clock and GPU: which rows are home after how many seconds.

    python -m qtuning_fast.bench.plans.rehearsal gpu                   the timetable
    python -m qtuning_fast.bench.plans.rehearsal gpu --slower 1.5      everything takes half as long again

The plan, its runner, its schedules and the units within each step are those of a real run. Only the processes are
simulated: for each, how long it keeps the host and the GPU (`durations.py`), with a number of cores shared among them.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qtuning_fast.bench.measure import QUICK
from qtuning_fast.bench.plans import (
    counters,
    diagnose,
    durations,
    gpu_tests,
    memcheck,
    plan,
    precompile,
    rank_backends,
    tune,
)
from qtuning_fast.bench.plans import run as running
from qtuning_fast.bench.plans.candidates import candidates
from qtuning_fast.bench.plans.plan import PLANS, TOTAL_SECONDS, Step
from qtuning_fast.bench.plans.precompile import COMPILED
from qtuning_fast.bench.plans.schedule import Schedule, Unit
from qtuning_fast.bench.rows import attention, growth
from qtuning_fast.bench.shapes import SHAPES

# What a process waits for: a share of the cores, the cores that all others leave, or the GPU.
HOST, NICE, GPU = "host", "nice", "gpu"
Work = Generator[tuple[str, float], None, Any]  # yields what it waits for and the seconds; returns a status
TICK = 0.1  # seconds
COMPILED_IN = durations.KERNEL + durations.LAUNCHER


@dataclass(frozen=True)
class Machine:
    """The machine of a rehearsal."""

    cores: int = 16
    slower: float = 1.0  # everything takes so many times as long as expected
    right: bool = True  # whether the kernels are right
    carried: bool = False  # whether a Triton cache that fits was brought along


@dataclass
class Process:
    """One thing at work; a step is one or several."""

    work: Work
    left: float = 0.0
    kind: str = HOST
    status: int | None = None

    def ended(self) -> int | None:
        return self.status

    def stop(self) -> None:
        self.status = -9 if self.status is None else self.status


@dataclass
class World:
    """Time, what runs in it, and what has been written and gathered by now."""

    machine: Machine = field(default_factory=Machine)
    now: float = 0.0
    written: dict[str, float] = field(default_factory=dict)  # rows by the time at which a step wrote them
    home: dict[str, float] = field(default_factory=dict)  # and at which they were in the one file
    compiled: set[str] = field(default_factory=set)
    processes: list[Process] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        """Lets time pass."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += TICK
            at_work = [p for p in self.processes if p.status is None]
            for process, share in zip(at_work, self._shares(at_work)):
                self._advance(process, TICK * share)

    def gather(self) -> None:
        for row, when in self.written.items():
            if when <= self.now:
                self.home.setdefault(row, self.now)

    def begin(self, work: Work) -> Process:
        process = Process(work)
        self.processes.append(process)
        return process

    def start(self, step: Step, deadline: float) -> Process:
        """A step, as `run.Run` asks for it."""
        return self.begin(STEPS[step.module](self, step, deadline))

    def row(self, name: str) -> None:
        self.written.setdefault(name, self.now)

    def starts(self) -> Iterator[tuple[str, float]]:
        """What each process that uses the GPU takes before it does anything."""
        yield HOST, durations.IMPORTS
        yield GPU, durations.CONTEXT

    def compiles(self, name: str, kernels: int) -> float:
        """Seconds of the host for kernels of ours that were not compiled before."""
        there = name in self.compiled or self.machine.carried
        self.compiled.add(name)
        return 0.0 if there else kernels * COMPILED_IN

    def _shares(self, at_work: list[Process]) -> list[float]:
        """Of a second."""
        cores, count = self.machine.cores, Counter(process.kind for process in at_work)
        host = min(1.0, cores / max(count[HOST], 1))
        nice = min(1.0, max(cores - count[HOST] * host, 0.05 * cores) / max(count[NICE], 1))
        share = {HOST: host, NICE: nice, GPU: 1.0}
        return [share[process.kind] / self.machine.slower for process in at_work]

    def _advance(self, process: Process, seconds: float) -> None:
        process.left -= seconds
        while process.left <= 0 and process.status is None:
            try:
                process.kind, more = next(process.work)
                process.left += more
            except StopIteration as end:
                process.status = end.value or 0


# The steps, by module


def _smoke(world: World, step: Step, deadline: float) -> Work:
    yield HOST, 2 * durations.IMPORTS  # from a disk that nothing was read from before
    yield GPU, durations.CONTEXT
    world.row("smoke: machine")
    yield HOST, world.compiles("smoke", 1)  # all kernels at once, on as many cores
    for backend in ("fused", "composed"):
        yield GPU, 1.0
        world.row(f"smoke: {backend}")
    return 0 if world.machine.right else 1


def _diagnose(world: World, step: Step, deadline: float) -> Work:
    yield from world.starts()
    yield HOST, durations.IMPORTS
    world.row("diagnose: compiled")  # `smoke` has compiled them
    yield from _sanitizers(world, "diagnose")
    for name in (*(case.name for case in diagnose.CASES), *(name for name, _ in diagnose.variants())):
        yield GPU, durations.CONTEXT + 1.0
        yield HOST, 4 * COMPILED_IN
        world.row(f"diagnose: {name}")
    return 1


# Tests: (part of their names, how many there are, how many of our kernels each compiles)
TESTS = (
    *((f"tests/attention/test_fused_gpu.py::{name}]", 1, 3) for name in gpu_tests.CHOSEN_IEEE),
    ("tests/attention/test_fused_gpu.py::test_real_shapes[bfloat16-", 6, 3),
    ("tests/attention/test_fused_gpu.py::test_the_same_bits_again[", 3, 1),
    ("tests/attention/test_fused_gpu.py::test_a_graph_replays", 1, 4),
    ("tests/attention/test_fused_gpu.py::test_two_streams", 1, 1),
    ("tests/attention/composed/test_composed_gpu.py::test_real_shapes[", 8, 3),
    ("tests/attention/composed/vendors/test_vendors_gpu.py::test_both_passes[", 51, 0),
    ("tests/integrations/test_mixed.py::", 4, 4),
    ("tests/attention/composed/test_composed_gpu.py::test_the_same_bits_again[", 4, 1),
    ("tests/attention/composed/test_composed_gpu.py::a_decoding_step_under_a_graph[", 3, 2),
    ("tests/attention/test_fused_gpu.py::test_a_compiled_step", 1, 8),
    ("tests/attention/test_fused_gpu.py::test_every_head_size[bfloat16-", 18, 4),
    ("tests/attention/test_fused_gpu.py::test_banks[", 18, 4),
    ("tests/attention/composed/vendors/test_vendors_gpu.py::", 11, 0),
    ("tests/attention/test_fused_gpu.py::test_memory", 1, 3),
    ("tests/attention/composed/test_composed_gpu.py::", 55, 3),
    ("tests/bench/test_peers.py::", 13, 3),
    ("tests/attention/test_fused_gpu.py::test_odd_sizes[", 32, 4),
    ("tests/attention/test_fused_gpu.py::test_every_gate[float16-", 24, 4),
    ("tests/attention/test_fused_gpu.py::test_every_gate[tf32-", 24, 4),
    ("tests/model/test_model.py::", 2, 8),
)


def _tests(world: World, step: Step, deadline: float) -> Work:
    names = [(f"{name}{number}", kernels) for name, count, kernels in TESTS for number in range(count)]
    names.sort(key=lambda one: gpu_tests.rank(one[0]))

    def shard(number: int) -> Work:
        yield HOST, 2.5 * durations.IMPORTS  # transformers and pytest as well
        yield GPU, durations.CONTEXT
        for name, kernels in names[number :: gpu_tests.SHARDS]:
            ieee = any(chosen in name for chosen in gpu_tests.CHOSEN_IEEE)
            yield HOST, kernels * ((durations.IEEE_KERNEL if ieee else durations.KERNEL) + durations.LAUNCHER)
            yield GPU, 1.0
            world.row(f"tests: {name}")

    yield from _side_by_side(world, [shard(number) for number in range(gpu_tests.SHARDS)], deadline)


def _precompile(world: World, step: Step, deadline: float) -> Work:
    """By as many processes as cores, each of which makes way once it does not wait for a GPU."""
    waiting = iter(precompile.wanted(precompile.command().parse_args(list(step.arguments)).plan))

    def worker() -> Work:
        yield from world.starts()
        for job in waiting:
            there = job.name in world.compiled or (job.needs_no_gpu and world.machine.carried)
            yield NICE if job.needs_no_gpu else HOST, 0.2 if there else job.seconds
            world.compiled.add(job.name)

    yield from _side_by_side(world, [worker() for _ in range(world.machine.cores)], deadline)


def _side_by_side(world: World, works: list[Work], deadline: float) -> Iterator[tuple[str, float]]:
    """Processes that one has started, and stops at the deadline."""
    yield HOST, durations.IMPORTS
    started = [world.begin(work) for work in works]
    while any(one.status is None for one in started) and world.now < deadline:
        yield GPU, 0.5
    for one in started:
        one.stop()


def _memcheck(world: World, step: Step, deadline: float) -> Work:
    yield HOST, durations.IMPORTS
    yield from _sanitizers(world, "memcheck")


def _sanitizers(world: World, step: str) -> Iterator[tuple[str, float]]:
    """A plain step, which compiles, then both tools at the same time."""
    yield from world.starts()
    yield HOST, world.compiles("memcheck", 4 * len(memcheck.SMALL))
    world.row(f"{step}: plain")
    yield HOST, 45.0  # assumed: a tenth of the speed
    for tool in memcheck.TOOLS:
        world.row(f"{step}: {tool}")


def _ceilings(world: World, step: Step, deadline: float) -> Work:
    yield from world.starts()
    yield GPU, 2.0
    world.row("ceilings")


def _counters(world: World, step: Step, deadline: float) -> Work:
    for name in counters.MEASURED:
        yield HOST, 3 * durations.IMPORTS  # under Nsight Compute; assumed
        yield GPU, 5.0
        world.row(f"counters: {name}")


def _attention(world: World, step: Step, deadline: float) -> Work:
    options = attention.command().parse_args(list(step.arguments))
    question = step.name.partition("-")[0]
    home = {row.removeprefix("attention: ") for row in world.home}  # of an earlier run
    begun = set[str]()

    def units() -> Iterator[Unit]:
        for name in attention.most_missing_first(options.shape, home if options.rest_of else ()):
            if not options.rest_of or attention.is_missing(name, options.peer, home):
                for unit in durations.rows(SHAPES[name], options.peer, QUICK, attention.PEAKS):
                    if unit.kind != "turns" or name in begun:
                        yield unit

    def compiling(unit: Unit) -> float:
        begun.add(unit.name.partition(":")[0])
        if unit.kind == "row" and unit.of in COMPILED and unit.name not in world.compiled:
            return durations.FLEX - durations.FLEX_AGAIN
        return world.compiles(unit.name, 4) if unit.kind == "row" and unit.of in plan.OURS else 0.0

    return _units(world, question, deadline, units(), compiling)


def _tune(world: World, step: Step, deadline: float) -> Work:
    jobs = {
        str(job): (len(candidates(tune.incumbent_of("sm_90", job))) - 1, tune.shapes_of(job.head_size, job.direction))
        for job in tune.asked(["bf16"], plan.TUNED_HEAD_SIZES, plan.TUNED_DIRECTIONS)
    }

    def compiling(unit: Unit) -> float:
        """A heat waits for those of its candidates that were not compiled before; one core makes each."""
        job, number = unit.of
        ranks = range(max(number, 0) * tune.HEAT, (number + 1) * tune.HEAT + 1)
        missing = sum(f"{job}: {rank}" not in world.compiled for rank in ranks)
        return durations.KERNEL * len(jobs[job][1]) if missing and not world.machine.carried else 0.0

    return _units(world, step.name, deadline, durations.heats(jobs, tune.HEAT, tune.ROUNDS), compiling)


def _choose(world: World, step: Step, deadline: float) -> Work:
    def compiling(unit: Unit) -> float:
        there = world.machine.carried or f"{unit.name}: launch 0" in world.compiled
        return 0.0 if there else precompile.MOST_LAUNCHES * COMPILED_IN

    units = rank_backends.units(rank_backends.training_shapes("cuda"))
    return _units(world, step.name, deadline, units, compiling)


def _growth(world: World, step: Step, deadline: float) -> Work:
    options = growth.command().parse_args(list(step.arguments))
    shapes = {name: growth.SERIES[name].shapes("cuda", tiny=False) for name in options.sizes}
    found = [growth.units(name, shapes[name], options.peer, growth.GROWTH_TURNS) for name in options.sizes]
    return _units(world, step.name, deadline, [unit for units in found for unit in units])


def _units(
    world: World,
    name: str,
    deadline: float,
    units: Iterable[Unit],
    compiling: Callable[[Unit], float] = lambda unit: 0.0,
) -> Work:
    """A step that fills its time with units, each of which may have to compile something first."""
    yield from world.starts()
    for unit in Schedule(deadline, clock=world.clock).each(units):
        yield HOST, compiling(unit)
        yield GPU, unit.seconds
        world.row(f"{name}: {unit.name}")


STEPS: dict[str, Callable[[World, Step, float], Work]] = {
    "plans.smoke": _smoke,
    "plans.diagnose": _diagnose,
    "plans.gpu_tests": _tests,
    "plans.precompile": _precompile,
    "plans.memcheck": _memcheck,
    "plans.tune": _tune,
    "plans.rank_backends": _choose,
    "plans.counters": _counters,
    "rows.roofline": _ceilings,
    "rows.attention": _attention,
    "rows.growth": _growth,
}


def rehearse(name: str, machine: Machine, before: World | None = None) -> tuple[running.Run, World]:
    """Runs a plan to its end. `before` is where an earlier plan has ended, whose rows are home already."""
    world = World(machine)
    if before is not None:
        world.home, world.written = dict.fromkeys(before.home, 0.0), dict.fromkeys(before.written, 0.0)
        world.compiled = set(before.compiled)
    one = running.Run(PLANS[name], world, clock=world.clock, gather=world.gather)
    one.all(TOTAL_SECONDS[name])
    return one, world


def timetable(one: running.Run, world: World, at: tuple[float, ...]) -> str:
    """Steps, and how many rows of each are home after so many seconds."""
    lines = [f"  {'':<16}{'s':>7}  {'':<28}" + "".join(f"{f'{t:.0f} s':>8}" for t in at)]
    for outcome in one.outcomes.values():
        rows = [when for row, when in world.home.items() if row.partition(":")[0] == outcome.name.partition("-")[0]]
        counts = "".join(f"{sum(when <= t for when in rows):>8}" for t in at)
        lines.append(f"  {outcome.name:<16}{outcome.seconds:>7.1f}  {outcome.status[:26]:<28}{counts}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", choices=("gpu", "gpu-second"))
    parser.add_argument("--slower", type=float, default=1.0, help="so many times as slow")
    parser.add_argument("--carried", action="store_true", help="with a Triton cache that fits")
    parser.add_argument("--wrong", action="store_true", help="with kernels that are wrong")
    options = parser.parse_args(arguments)
    machine = Machine(slower=options.slower, carried=options.carried, right=not options.wrong)
    before = rehearse("gpu", machine)[1] if options.plan == "gpu-second" else None
    one, world = rehearse(options.plan, machine, before)
    print(timetable(one, world, (60, 120, 180, 300, 420, 540)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
