"""Predicts how long a compiled kernel takes on a GPU that is absent.

A model of a multiprocessor (multiprocessor.py) executes the kernel's SASS, with as many programs as registers and
shared memory allow, and with loops that run as often as the source says (loop_counts.py). The rest is arithmetic:

    bytes       what the kernel's tensors hold comes from memory once, as far as the cache does not have it; what its
                programs load beyond that comes from the cache: both give loads a latency and a bandwidth
    programs    go to whichever place on a multiprocessor is free, in their order; the last ones have it to themselves
    a step      kernels follow each other, each with a launch

Constants and where they come from are in `Device` and in multiprocessor.py; published.py compares the model with
published speeds.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qtuning_fast.bench.predictions.compile_report import TARGETS, resources
from qtuning_fast.bench.predictions.instructions import PIPES, QUARTERS, Memory, bytes_of
from qtuning_fast.bench.predictions.loop_counts import Place, loop_counts
from qtuning_fast.bench.predictions.multiprocessor import simulate
from qtuning_fast.bench.predictions.sass import Code, CodeError, Loop, disassemble
from qtuning_fast.bench.predictions.trace import Trace, before_loops, trace
from qtuning_fast.kernels.launch import Launch

ITERATIONS = 8  # of a loop that are executed; the others take as long as the later of these
REPEATS = 3  # programs one after the other in one place
MOST_WARPS = 16  # of a quarter
MOST_PROGRAMS = 32  # of a multiprocessor
WIDEST = 64  # bytes a clock between a multiprocessor and the cache: NVIDIA, "A100 architecture" white paper
BOUND = 0.75  # a pipe that is busy for so much of the time is what bounds a kernel


@dataclass(frozen=True)
class Device:
    """A GPU of compute capability 9.0."""

    name: str
    memory: float  # bytes a second, read plus written, as measured by copies
    cache: int  # bytes of the second level
    products: float  # operations a second of 16-bit matrix products, as measured on random numbers of size 8192
    multiprocessors: int = 132
    # Under load. Products at the speed above need 1.48e9; the data sheet's 989e12 are reached at 1.83e9.
    clock: float = 1.7e9
    cache_bandwidth: float = 5.5e12  # bytes a second to all multiprocessors
    cache_latency: float = 270  # clocks: Luo et al., arXiv 2402.13499, table of latencies
    memory_latency: float = 600  # clocks: there 479 for one lone load; under load more
    launch: float = 1.2e-6  # seconds from the end of one kernel in a CUDA graph to the start of the next

    @property
    def cache_that_holds(self) -> float:
        """Bytes; each half of the cache keeps its own copy of what all multiprocessors read."""
        return self.cache / 2


H100 = Device("h100", memory=3.0e12, cache=50 << 20, products=798e12)
H200 = Device("h200", memory=4.3e12, cache=60 << 20, products=785e12)
DEVICES = {device.name: device for device in (H100, H200)}


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one launch, and what bounds it."""

    microseconds: float  # with the launch
    bound: str  # the pipe that is busy most of the time, or "latency"; "launch"
    busy: dict[str, float]  # the share of the time that each pipe works; "issue": the schedulers
    registers: int  # a thread
    spilled: int
    shared: int  # bytes a program
    resident: int  # programs of a multiprocessor
    programs: int
    from_memory: int  # bytes
    from_cache: int  # bytes that programs load and store in all


@dataclass
class Cache:
    """Which tensors the second-level cache holds, the latest last."""

    capacity: float
    held: dict[Any, int] = field(default_factory=dict)

    def missing(self, tensors: Mapping[Any, int]) -> int:
        """Bytes of a kernel's tensors that the cache does not hold; then it holds them."""
        absent = sum(size for key, size in tensors.items() if key not in self.held)
        for key, size in tensors.items():
            self.held.pop(key, None)
            self.held[key] = size
        while self.held and sum(self.held.values()) > self.capacity:
            del self.held[next(iter(self.held))]
        return absent


def predict(launch: Launch, compiled: Any, device: Device, cache: Cache | None = None) -> Prediction:
    """Predicts the time of a launch. Raises CodeError or LoopCountError.

    Args:
        compiled: the launch's kernel, for sm_90.
        cache: the tensors that the cache holds before the launch, updated to those after it; None: none.
    """
    found = resources(compiled, TARGETS["sm_90"])
    warps = compiled.metadata.num_warps
    programs = loop_counts(launch)
    code = disassemble(compiled.asm["cubin"])
    loops = code.loops
    kinds = times_of(loops, programs.kinds)
    count = Counter(programs.order.tolist())
    paths = [trace(code, loops, times, ITERATIONS) for times in kinds]
    outside = before_loops(code, loops)
    there = _share_that_is_there(launch)
    moved = warps * there * sum(n * _bytes(code, loops, paths[kind], kinds[kind]) for kind, n in count.items())
    own = warps * there * sum(n * _bytes_outside(code, outside, paths[kind]) for kind, n in count.items())
    held = tensors(launch.arguments.values())
    missing = sum(held.values()) if cache is None else cache.missing(held)
    missing = min(missing, int(moved))
    active = min(device.multiprocessors, max(len(programs.order), 1))
    memories = (
        _memory(device, max(missing - own, 0) / max(moved - own, 1), active, there),
        _memory(device, min(missing / max(own, 1), 1), active, there),
    )
    machine = _Machine(code, loops, memories, outside, warps, device)

    resident = max(1, min(found["resident"], MOST_PROGRAMS, MOST_WARPS * QUARTERS // warps))
    together = min(resident, math.ceil(len(programs.order) / device.multiprocessors))
    clocks, busy = _makespan(machine, kinds, programs.order.tolist(), max(together, 1))
    seconds = clocks / device.clock
    seconds = max(seconds, missing / device.memory, moved / device.cache_bandwidth)
    return Prediction(
        microseconds=round((seconds + device.launch) * 1e6, 2),
        bound=_bound(busy, seconds, device, missing, moved),
        busy={name: round(share, 3) for name, share in busy.items()},
        registers=found["registers"],
        spilled=found["spilled"],
        shared=found["shared"],
        resident=resident,
        programs=len(programs.order),
        from_memory=int(missing),
        from_cache=int(moved),
    )


def times_of(loops: Sequence[Loop], kinds: Sequence[Mapping[Place, int]]) -> list[list[int]]:
    """For each kind of programs how often each loop of the code runs, from how often those of the source do.

    They are matched by line; where a function was inlined several times, by order. Raises CodeError.
    """
    times = [[0] * len(loops) for _ in kinds]
    places = {place for kind in kinds for place in kind}
    for line in {(place.file, place.line) for place in places} | {(loop.file, loop.line) for loop in loops}:
        here = [number for number, loop in enumerate(loops) if (loop.file, loop.line) == line]
        there = sorted(place for place in places if (place.file, place.line) == line)
        most = max((kind.get(place, 0) for kind in kinds for place in there), default=0)
        if not here and most <= 1:
            continue  # what runs once is no loop any more
        if len(here) != len(there) and len(here) != 1 and there:
            raise CodeError(
                f"{line[0]}:{line[1]} is {len(here)} loops in the code and {len(there)} in the source, run {most} times"
            )
        for kind, row in zip(kinds, times):
            counts = [kind.get(place, 0) for place in there]
            for number, count in zip(here, counts if len(here) == len(there) else [max(counts, default=0)]):
                row[number] = count
    return times


def tensors(arguments: Iterable[Any]) -> dict[Any, int]:
    """The bytes of all tensors among a kernel's arguments, each counted once."""
    found: dict[Any, int] = {}
    for value in arguments:
        if isinstance(value, Tensor):
            found[value.untyped_storage()._cdata] = value.numel() * value.element_size()
        elif isinstance(value, tuple):
            found |= tensors(value)
    return found


def _bytes(code: Code, loops: Sequence[Loop], path: Trace, times: Sequence[int]) -> float:
    """Bytes that a warp moves from and to global memory, including the iterations that its trace leaves out."""
    ones = code.instructions
    moved = sum(bytes_of(ones[index]) for at, index in enumerate(path.indexes) if at not in path.nothing)
    for loop, count in zip(loops, times):
        if count > ITERATIONS:
            moved += (count - ITERATIONS) * sum(bytes_of(one) for one in ones[loop.first : loop.last + 1])
    return moved


def _share_that_is_there(launch: Launch) -> float:
    """The share of the rows of tiles that exist: the last tile reaches beyond the queries."""
    variant, sizes = launch.arguments.get("variant"), launch.arguments.get("sizes")
    if variant is None or sizes is None or not variant.BLOCK_M.value:
        return 1.0
    return min(
        size / (-(-size // block) * block)
        for size, block in ((sizes.N, variant.BLOCK_N.value), (sizes.M, variant.BLOCK_M.value))
    )


def _bytes_outside(code: Code, outside: frozenset[int], path: Trace) -> float:
    return sum(bytes_of(code.instructions[index]) for index in path.indexes if index in outside)


def _memory(device: Device, share: float, active: int, there: float) -> Memory:
    """Global memory as a quarter of a multiprocessor sees it, where this share is not in the cache.

    Bandwidth is in bytes that instructions ask for; of them only a share is there to be moved.
    """
    a_second = min(device.cache_bandwidth, device.memory / share if share else math.inf)
    a_clock = min(a_second / active / device.clock, WIDEST)
    latency = share * device.memory_latency + (1 - share) * device.cache_latency
    return Memory(a_clock / QUARTERS / there, latency)


@dataclass(frozen=True)
class _Machine:
    """What executes a kernel's programs."""

    code: Code
    loops: list[Loop]
    memories: tuple[Memory, Memory]  # as loops see it, and what is outside of them
    outside: frozenset[int]
    warps: int  # of a program
    device: Device

    def execute(self, times: Sequence[int], together: int, several: bool) -> "_Executed":
        """Executes a program among others of its kind; `several`: the average of a few, one after the other."""
        path = trace(self.code, self.loops, times, ITERATIONS)
        in_quarter = max(1, self.warps // QUARTERS)
        slots = together if self.warps >= QUARTERS else math.ceil(together * self.warps / QUARTERS)
        found = simulate(self.code, path, *self.memories, self.outside, in_quarter, slots)
        clocks, programs = found.total, slots
        if several:
            apart = found.total / slots
            found = simulate(self.code, path, *self.memories, self.outside, in_quarter, slots, REPEATS, apart)
            clocks = sum(found.ended[slots : 2 * slots]) / slots - sum(found.ended[:slots]) / slots
            programs = slots * REPEATS
        quarter = min(1.0, self.warps / QUARTERS)
        shares = {"issue": found.issued, **dict(zip(PIPES, found.busy))}
        return _Executed(clocks, found.iteration, {name: spent / programs * quarter for name, spent in shares.items()})


def _makespan(
    machine: _Machine, kinds: Sequence[Sequence[int]], order: Sequence[int], together: int
) -> tuple[float, dict[str, float]]:
    """Clocks until the last program has ended, and the share of them in which pipes are busy."""
    multiprocessors = machine.device.multiprocessors
    places = together * multiprocessors
    last = len(order) % places if len(order) > places else 0
    durations, work = _durations(machine, kinds, order, together, len(order) > places)
    at_last = durations
    fewer = math.ceil(last / multiprocessors)
    if 0 < fewer < together:
        at_last, _ = _durations(machine, kinds, order[-last:], fewer, False)
    free = [0.0] * min(places, max(len(order), 1))
    total: dict[str, float] = dict.fromkeys(("issue", *PIPES), 0.0)
    for position, kind in enumerate(order):
        of = at_last if position >= len(order) - last else durations
        heapq.heapreplace(free, free[0] + of[kind])
        for name, clocks in work[kind].items():
            total[name] += clocks
    end = max(free)
    return end, {name: clocks / multiprocessors / end for name, clocks in total.items()}


def _durations(
    machine: _Machine, kinds: Sequence[Sequence[int]], order: Sequence[int], together: int, several: bool
) -> tuple[list[float], list[dict[str, float]]]:
    """Of each kind of program the clocks that one takes among so many, and those that it keeps each pipe.

    Kinds that go the same way through the code are executed once, the one that runs longest; the others differ by
    iterations. Programs have others of all kinds beside them: each is slowed as they are on average.
    """
    ways = [tuple(count > 0 for count in times) for times in kinds]
    longest = {way: list(times) for way, times in sorted(zip(ways, kinds), key=lambda pair: sum(pair[1]))}
    among = {way: machine.execute(times, together, several) for way, times in longest.items()}
    alone = among
    if len(longest) > 1 and together > 1:
        alone = {way: machine.execute(times, 1, False) for way, times in longest.items()}
    slowed = alone_for = 0.0
    for kind, programs in Counter(order).items():
        clocks = _clocks(alone[ways[kind]], kinds[kind], longest[ways[kind]])
        alone_for += programs * clocks
        slowed += programs * clocks * among[ways[kind]].clocks / alone[ways[kind]].clocks
    slower = slowed / alone_for if alone_for else 1.0

    durations, work = [], []
    for way, times in zip(ways, kinds):
        durations.append(slower * _clocks(alone[way], times, longest[way]))
        share = _clocks(among[way], times, longest[way]) / among[way].clocks
        work.append({name: share * clocks for name, clocks in among[way].busy.items()})
    return durations, work


@dataclass(frozen=True)
class _Executed:
    """A program that was executed among others of its kind."""

    clocks: float
    iteration: dict[int, float]  # clocks, by the number of a loop
    busy: dict[str, float]  # clocks that it keeps each pipe


def _clocks(found: _Executed, times: Sequence[int], executed: Sequence[int]) -> float:
    """The clocks of a program whose loops run so often, from one that was executed with loops cut short."""
    ran = [min(count, ITERATIONS) for count in executed]
    more = sum((count - one) * found.iteration.get(number, 0.0) for number, (count, one) in enumerate(zip(times, ran)))
    return max(found.clocks + more, found.clocks / ITERATIONS)


def _bound(busy: Mapping[str, float], seconds: float, device: Device, missing: float, moved: float) -> str:
    if missing / device.memory > BOUND * seconds:
        return "memory"
    if moved / device.cache_bandwidth > BOUND * seconds:
        return "cache"
    if device.launch > seconds:
        return "launch"
    most = max(busy, key=lambda name: busy[name])
    if busy[most] <= BOUND:
        return "latency"
    return (
        most if most != "global" else "memory" if missing / device.memory > moved / device.cache_bandwidth else "cache"
    )
