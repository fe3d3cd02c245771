"""Simulates a quarter of a multiprocessor that executes SASS, in the detail that an estimate needs.

A multiprocessor of Hopper has four equal quarters, each with a scheduler that issues one instruction a cycle, its own
arithmetic pipes and a tensor core; shared memory and the way to the second-level cache they share. Warps of a program
are spread evenly, and a warp group's four warps have one quarter each: so one quarter, with a quarter of what is
shared, tells the time of all. A warp issues in order: when its stall is over, the barriers it waits for are set, and
the pipe is free. The warp that can issue first does.

What is left out: the instruction caches, bank conflicts of registers and shared memory, the first-level cache, what a
predicate switches off.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qtuning_fast.bench.predictions.instructions import (
    BESIDE_PRODUCTS,
    CALL,
    NEXT_PROGRAM,
    NOTHING,
    PIPES,
    QUEUES,
    READ_LATENCY,
    TENSOR,
    Cost,
    Memory,
    cost,
)
from qtuning_fast.bench.predictions.sass import NONE, Code, CodeError, Instruction
from qtuning_fast.bench.predictions.trace import Trace

BARRIERS = 6  # of a warp


@dataclass(frozen=True)
class Times:
    """The result of a simulation, in clocks."""

    ended: list[float]  # when programs ended, in that order
    iteration: dict[int, float]  # of loops, by number: in the long run
    busy: list[float]  # of each pipe
    issued: int  # instructions

    @property
    def total(self) -> float:
        return self.ended[-1]


def simulate(
    code: Code,
    path: Trace,
    memory: Memory,
    own: Memory,
    outside: frozenset[int],
    warps: int,
    residents: int,
    repeats: int = 1,
    apart: float = 0.0,
) -> Times:
    """Each of the resident programs runs `repeats` times, one after the other; the next resident starts `apart` later.

    Args:
        own: global memory as instructions `outside` see it, who load and store what no other program does.
        warps: of a program, in this quarter.

    Raises CodeError.
    """
    costs = [cost(one, own if index in outside else memory) for index, one in enumerate(code.instructions)]
    steps = [
        (code.instructions[index], NOTHING if position in path.nothing else costs[index])
        for position, index in enumerate(path.indexes)
    ]
    programs = [_Program(slot * apart, warps, repeats) for slot in range(residents)]
    return _Quarter(steps, path.ends, programs).run()


class _Warp:
    def __init__(self, program: "_Program") -> None:
        self.program = program

    def begin(self, time: float) -> None:
        self.at = 0
        self.ready = time
        self.waits = False  # for the other warps of its program
        self.barriers = [0.0] * BARRIERS  # when they are set
        self.products = 0.0  # when those under way end
        self.groups: list[float] = []  # when closed groups of them do
        self.copied = 0.0
        self.copies: list[float] = []
        self.iterations: dict[int, list[float]] = {}  # when they ended, by loop


class _Program:
    """A place in which programs run one after the other."""

    def __init__(self, start: float, warps: int, repeats: int) -> None:
        self.warps = [_Warp(self) for _ in range(warps)]
        self.arrived = 0
        self.left = repeats
        self.begin(start)

    def begin(self, time: float) -> None:
        for warp in self.warps:
            warp.begin(time)

    def all_arrived(self, warp: _Warp) -> bool:
        warp.waits = True
        self.arrived = (self.arrived + 1) % len(self.warps)
        return self.arrived == 0


@dataclass
class _Quarter:
    steps: list[tuple[Instruction, Cost]]  # what a warp executes
    ends: dict[int, int]  # where in it an iteration ends, and of which loop
    programs: list[_Program]
    free: list[float] = field(default_factory=lambda: [0.0] * len(PIPES))  # when pipes are
    busy: list[float] = field(default_factory=lambda: [0.0] * len(PIPES))
    now: float = 0.0
    issued: int = 0
    ended: list[float] = field(default_factory=list)
    gaps: dict[int, list[float]] = field(default_factory=dict)  # between iterations, by loop

    def run(self) -> Times:
        warps = [warp for program in self.programs for warp in program.warps]
        while warps:
            chosen, start = None, 0.0
            for warp in warps:
                if not warp.waits:
                    time = self._earliest(warp)
                    if chosen is None or time < start:
                        chosen, start = warp, time
            if chosen is None:
                raise CodeError("all warps wait for each other")
            self.now = max(self.now, start)
            self._issue(chosen)
            if chosen.at == len(self.steps):
                self._end(chosen)
                warps = [warp for warp in warps if warp.program.left]
        iteration = {number: sum(gaps) / len(gaps) for number, gaps in self.gaps.items()}
        return Times(self.ended, iteration, self.busy, self.issued)

    def _earliest(self, warp: _Warp) -> float:
        """When the warp can issue, as far as this does not depend on others."""
        one, price = self.steps[warp.at]
        time = warp.ready
        for barrier in one.waits:
            if warp.barriers[barrier] > time:
                time = warp.barriers[barrier]
        if price.pipes:
            pipe = price.pipes[0][0]
            return max(time, self.free[pipe] - QUEUES[pipe])
        if price.what == "wait" and len(warp.copies) > price.number:
            return max(time, *warp.copies[: len(warp.copies) - price.number])
        if price.what == "group wait" and len(warp.groups) > price.number:
            return max(time, *warp.groups[: len(warp.groups) - price.number])
        return time

    def _issue(self, warp: _Warp) -> None:
        one, price = self.steps[warp.at]
        now = self.now
        done = now + price.latency
        for place, (pipe, clocks) in enumerate(price.pipes):
            self.free[pipe] = max(now, self.free[pipe]) + clocks
            self.busy[pipe] += clocks
            if place == 0:
                done = self.free[pipe] + price.latency
        if price.what == "copy":
            warp.copied = max(warp.copied, done)
        elif price.what == "commit":
            warp.copies.append(warp.copied)
        elif price.what == "group":
            warp.products = done
            if price.number:
                warp.groups.append(done)
        if one.sets != NONE:
            warp.barriers[one.sets] = max(warp.barriers[one.sets], done)
        if one.frees != NONE:
            warp.barriers[one.frees] = max(warp.barriers[one.frees], now + READ_LATENCY)
        if warp.at in self.ends:
            warp.iterations.setdefault(self.ends[warp.at], []).append(now)
        self.issued += 1
        self.now += BESIDE_PRODUCTS if self.free[TENSOR] > now else 1
        warp.ready = now + (CALL if one.base == "CALL" else max(one.stall, 1))
        warp.at += 1
        if price.what == "barrier" and warp.program.all_arrived(warp):
            for other in warp.program.warps:
                other.waits, other.ready = False, now + price.latency

    def _end(self, warp: _Warp) -> None:
        for number, times in warp.iterations.items():
            if len(times) > 1:
                self.gaps.setdefault(number, []).append(_in_the_long_run(times))
        program = warp.program
        if program.all_arrived(warp):
            self.ended.append(self.now)
            program.left -= 1
            if program.left:
                program.begin(self.now + NEXT_PROGRAM)


def _in_the_long_run(times: Sequence[float]) -> float:
    """Clocks between the ends of iterations, without the first ones."""
    half = len(times) // 2
    return (times[-1] - times[half - 1]) / (len(times) - half)
