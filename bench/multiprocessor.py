"""A quarter of a multiprocessor executes SASS: cycle by cycle as far as one needs it for an estimate.

A multiprocessor of Hopper has four equal quarters, each with a scheduler that issues one instruction a cycle, its own
arithmetic pipes and a tensor core; shared memory and the way to the second-level cache they share. Warps of a program
are spread evenly, and a warp group's four warps have one quarter each: so one quarter, with a quarter of what is shared,
tells the time of all. A warp issues in order: when its stall is over, the barriers it waits for are set, and the pipe is
free. Whoever can issue first does.

What is left out: the instruction caches, bank conflicts of registers and shared memory, the first-level cache, what a
predicate switches off.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qtuning_fast.bench.sass import NONE, Code, Instruction, Loop, NotUnderstood

QUARTERS = 4
LANES = 32  # of a warp
SECTOR = 32  # bytes: the least that is read
SHARED_BYTES = 128 / QUARTERS  # a clock: NVIDIA, "Hopper tuning guide"

# Clocks that a warp's instruction keeps its pipe: 32 over lanes in a quarter. From the results a clock of a
# multiprocessor of compute capability 9.0 in NVIDIA's "CUDA C++ Programming Guide", arithmetic instructions.
FMA, HALF, SPECIAL, UNIFORM = 1, 2, 8, 2
TENSOR_FMA = 512  # 16-bit products and sums a clock: 4,096 operations a clock of a multiprocessor
MMA_SHARE = 0.62  # of that by the older warp-wide HMMA: Luo et al., arXiv 2402.13499, table of mma and wgmma

# Clocks of the scheduler that an instruction takes while the tensor core works. HGMMA's sums lie in registers: 16 rows of
# N float32 are read and written in N/2 clocks, 128 bytes a clock each way, as much as one other instruction takes.
# Assumed: no source says it. Without it no head size would see less than FlashAttention-3 leaves over.
BESIDE_PRODUCTS = 2

# Clocks from issue to result where the compiler leaves it to a barrier. Shared memory: Luo et al., arXiv 2402.13499.
# Special functions, shuffles and the like: as Jia et al. found on Volta, arXiv 1804.06826, and near enough since.
SHARED_LATENCY, SPECIAL_LATENCY, SHUFFLE_LATENCY, OTHER_LATENCY = 29, 20, 23, 20
GROUP_LATENCY = 32  # of HGMMA beyond the time of its products: m64n8k16 takes as long, arXiv 2402.13499
READ_LATENCY = 12  # until an instruction's operands have been read
BARRIER_LATENCY = 20  # from the last warp's arrival until all go on
FENCE_LATENCY = 20
CALL = 60  # clocks of a subroutine: 64-bit division

_ALU = frozenset(
    "FMNMX FSEL FSETP FSET FCHK ISETP IADD3 VIADD VIADDMNMX VIMNMX IMNMX IABS LOP3 PLOP3 SHF LEA SEL SGXT PRMT MOV P2R "
    "R2P F2FP F2F I2FP FLO BMSK CS2R HMNMX2 HSETP2".split()
)
_FMA = frozenset("FFMA FMUL FADD FFMA32I FMUL32I FADD32I".split())
_FMA_HALF = frozenset("IMAD HFMA2 HADD2 HMUL2 IDP".split())
_SPECIAL = frozenset("MUFU I2F F2I POPC FRND BREV".split())
_GLOBAL_LOADS = frozenset(["LDG", "LD"])
_GLOBAL_STORES = frozenset(["STG", "ST", "RED", "ATOMG", "ATOM"])
_SHARED = frozenset(["LDS", "STS", "LDSM", "STSM", "ATOMS"])
_GROUP_PRODUCTS = frozenset(["HGMMA", "QGMMA", "IGMMA"])
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

PIPES = ("fp32", "alu", "special", "uniform", "tensor", "shared", "memory")
_FP32, _ALU_PIPE, _SPECIAL_PIPE, _UNIFORM_PIPE, _TENSOR, _SHARED_PIPE, _MEMORY = range(len(PIPES))

# How long instructions queue for a pipe, in clocks of it, before a warp that wants more of it stands still. Of global
# memory 32 KB of a multiprocessor may be under way: what covers its latency at its bandwidth, twice.
QUEUES = (0, 0, 0, 0, 1e9, 64, 32 * 1024 / QUARTERS / 6)


@dataclass(frozen=True)
class Memory:
    """Global memory as a quarter sees it when all multiprocessors use it alike."""

    bytes_a_clock: float
    latency: float  # clocks


@dataclass(frozen=True)
class Cost:
    """What an instruction takes."""

    what: str  # "plain", "result", "copy", "commit", "wait", "group", "group wait", "barrier", "end"
    pipes: tuple[tuple[int, float], ...] = ()  # and the clocks that it keeps each
    latency: float = 0  # until its result is there
    number: int = 0  # of groups that may be under way still


_NOTHING = Cost("plain")


def cost(one: Instruction, memory: Memory) -> Cost:
    """What an instruction takes."""
    base = one.base
    if one.predicate == "!PT":
        return Cost("plain")
    if base in _FMA:
        return Cost("plain", ((_FP32, FMA),))
    if base in _FMA_HALF:
        return Cost("plain", ((_FP32, HALF),), OTHER_LATENCY)
    if base in _SPECIAL:
        return Cost("result", ((_SPECIAL_PIPE, SPECIAL),), SPECIAL_LATENCY)
    if base in _ALU:
        return Cost("plain", ((_ALU_PIPE, HALF),), OTHER_LATENCY)
    if base in _GROUP_PRODUCTS:
        return _group_product(one)
    if base == "WARPGROUP" and "DEPBAR" in one.name:
        return Cost("group wait", number=_last_number(one))
    if base in ("HMMA", "IMMA", "QMMA"):
        return _warp_product(one)
    if base in _SHARED:
        matrices = {"2": 8, "4": 16} if base in ("LDSM", "STSM") else {}
        size = next((size for part, size in matrices.items() if part in one.name.split(".")), _width(one))
        return Cost("result", ((_SHARED_PIPE, size * LANES / SHARED_BYTES),), SHARED_LATENCY)
    if base == "SHFL":
        return Cost("result", ((_SHARED_PIPE, 4 * LANES / SHARED_BYTES),), SHUFFLE_LATENCY)
    if base in _GLOBAL_LOADS or base in _GLOBAL_STORES:
        clocks = bytes_of(one) / memory.bytes_a_clock
        return Cost("result", ((_MEMORY, clocks),), memory.latency if base in _GLOBAL_LOADS else OTHER_LATENCY)
    if base == "LDGSTS":
        size = bytes_of(one)
        return Cost("copy", ((_MEMORY, size / memory.bytes_a_clock), (_SHARED_PIPE, size / SHARED_BYTES)), memory.latency)
    if base == "LDGDEPBAR":
        return Cost("commit")
    if base == "DEPBAR":
        return Cost("wait", number=_last_number(one)) if "SB0" in one.operands else Cost("plain")
    if base == "BAR":
        return Cost("barrier", latency=BARRIER_LATENCY)
    if base in ("MEMBAR", "FENCE"):
        return Cost("result", latency=FENCE_LATENCY)
    if base == "CALL":
        return Cost("plain", latency=CALL)
    if base.startswith("U"):
        return Cost("plain", ((_UNIFORM_PIPE, UNIFORM),), OTHER_LATENCY)
    if base.startswith(("UTMA", "SYNCS")):
        raise NotUnderstood(f"{one.name}: copies by the tensor memory accelerator are not modelled")
    return Cost("result", latency=OTHER_LATENCY)


def bytes_of(one: Instruction) -> int:
    """Bytes that a warp's instruction moves from or to global memory.

    A lane that loads no more than 4 bytes loads what belongs to its row or its column, as many lanes beside it do: a
    sector a warp.
    """
    moves = one.base in _GLOBAL_LOADS or one.base in _GLOBAL_STORES or one.base == "LDGSTS"
    if not moves or one.predicate == "!PT":
        return 0
    width = _width(one)
    return SECTOR if width <= 4 and one.base in _GLOBAL_LOADS else width * LANES


def _group_product(one: Instruction) -> Cost:
    """HGMMA m64nNk16 of a warp group: a quarter has 16 of its 64 rows.

    Its operands in shared memory are read once for all four quarters. gsb0 marks the last of a group.
    """
    columns = int(one.name.split(".")[1].split("x")[1])
    tensor = 16 * columns * 16 / TENSOR_FMA
    rows_of_b, bytes_a_row = columns, 32
    shared = rows_of_b * bytes_a_row + (64 * bytes_a_row if "gdesc" in one.operands.split(",")[1] else 0)
    shared_clocks = shared / QUARTERS / SHARED_BYTES
    pipes = ((_TENSOR, max(tensor, shared_clocks)), (_SHARED_PIPE, shared_clocks))
    return Cost("group", pipes, GROUP_LATENCY, number=int("gsb0" in one.operands))


def _warp_product(one: Instruction) -> Cost:
    """HMMA.16816 and its like: m16n8k16 of a warp."""
    shape = one.name.split(".")[1]
    m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "1684": (16, 8, 4)}.get(shape, (16, 8, 16))
    width = 2 if ".TF32" in one.name else 1
    return Cost("plain", ((_TENSOR, m * n * k * width / TENSOR_FMA / MMA_SHARE),), SHARED_LATENCY)


def _width(one: Instruction) -> int:
    return next((size for part, size in _WIDTHS.items() if part in one.name.split(".")[1:]), 4)


def _last_number(one: Instruction) -> int:
    return int(one.operands.rsplit(",", 1)[-1].strip(), 0)


@dataclass(frozen=True)
class Trace:
    """What a warp executes, by index, and where in it a loop's iteration ends."""

    indexes: tuple[int, ...]
    ends: dict[int, int]  # a position in `indexes`, and the loop by its number
    nothing: frozenset[int]  # positions of copies that are switched off: of iterations that do not come


def trace(code: Code, loops: Sequence[Loop], times: Sequence[int], at_most: int) -> Trace:
    """The way through the code that runs loops so often, but none more than `at_most`; 0: it is not even entered.

    Of a branch forward it is known which loops it leaves out: it is taken to reach those that run, or around those that
    do not; around a subroutine; else not. Raises NotUnderstood.
    """
    whole, times = times, [min(count, at_most) for count in times]
    ahead = [_copies_ahead(code, loops, loop) for loop in loops]
    passed = [0] * len(loops)  # copies before a loop since it ended last
    nothing: set[int] = set()
    done = [0] * len(loops)
    by_end = {loop.last: number for number, loop in enumerate(loops)}
    indexes: list[int] = []
    ends: dict[int, int] = {}
    at = 0
    while at < len(code.instructions):
        one = code.instructions[at]
        if len(indexes) > 400_000:
            raise NotUnderstood("no way to the end of the code was found")
        if one.base == "LDGSTS":
            for number, (before, inside) in enumerate(ahead):
                if at in before:
                    stage = passed[number] // max(inside, 1)
                    passed[number] += 1
                elif loops[number].first <= at <= loops[number].last and before:
                    stage = done[number] + len(before) // max(inside, 1)
                else:
                    continue
                if stage >= whole[number]:
                    nothing.add(len(indexes))
        indexes.append(at)
        if one.base == "EXIT" and one.predicate == "":
            return Trace(tuple(indexes), ends, frozenset(nothing))
        if not one.branches or one.target is None:
            at += 1
        elif at in by_end:
            number = by_end[at]
            done[number] += 1
            ends[len(indexes) - 1] = number
            for inner, loop in enumerate(loops):  # those within start anew
                if loops[number].first <= loop.first and loop.last < loops[number].last:
                    done[inner] = passed[inner] = 0
            again = done[number] < times[number] or one.predicate == ""
            at = one.target if again else at + 1
        elif one.predicate == "":
            at = one.target
        else:
            at = one.target if _taken(code, loops, times, done, at, one.target) else at + 1
    raise NotUnderstood("the code has no end")


def _copies_ahead(code: Code, loops: Sequence[Loop], loop: Loop) -> tuple[frozenset[int], int]:
    """The asynchronous copies between a loop and the one before, which start its first iterations, and those in it."""
    start = max((other.last for other in loops if other.last < loop.first), default=-1) + 1
    copies = [index for index, one in enumerate(code.instructions) if one.base == "LDGSTS"]
    inside = sum(loop.first <= index <= loop.last for index in copies)
    return frozenset(index for index in copies if start <= index < loop.first) if inside else frozenset(), inside


def _taken(
    code: Code, loops: Sequence[Loop], times: Sequence[int], done: Sequence[int], at: int, target: int
) -> bool:
    if target <= at:
        return False
    for number, loop in enumerate(loops):
        if loop.first <= at <= loop.last < target and code.instructions[loop.last].predicate == "":
            return done[number] >= times[number]  # the way out of a loop that tests first
    skipped = [number for number, loop in enumerate(loops) if at < loop.first and loop.last < target]
    if any(times[number] > 0 for number in skipped):
        return False
    return bool(skipped) or any(code.instructions[index].base == "CALL" for index in range(at + 1, target))


class _Warp:
    __slots__ = ("at", "barriers", "group", "groups", "copies", "copied", "program", "ready", "slot", "begun", "waiting")

    def __init__(self, slot: int, program: int, ready: float) -> None:
        self.slot, self.program, self.ready = slot, program, ready
        self.begin(ready)

    def begin(self, time: float) -> None:
        self.at, self.begun, self.ready, self.waiting = 0, time, time, False
        self.barriers = [0.0] * 6
        self.group, self.groups = 0.0, []  # when products under way end, and those of closed groups
        self.copied, self.copies = 0.0, []


@dataclass
class Times:
    """Clocks."""

    programs: list[float]  # from its start to its end, in the order of their ends
    ended: list[float]  # when they ended
    iteration: dict[int, float]  # of loops, by number: in the long run
    busy: list[float]  # of each pipe
    issued: int
    total: float


def simulate(
    code: Code, path: Trace, memory: Memory, warps: int, residents: int, repeats: int = 1, apart: float = 0.0
) -> Times:
    """Each of the resident programs runs `repeats` times, one after the other; the next resident starts `apart` later.

    Args:
        warps: of a program, in this quarter.
    """
    costs = [cost(one, memory) for one in code.instructions]
    steps = [
        (code.instructions[index], _NOTHING if position in path.nothing else costs[index])
        for position, index in enumerate(path.indexes)
    ]
    ends = path.ends
    all_warps = [_Warp(slot, 0, slot * apart) for slot in range(residents) for _ in range(warps)]
    free = [0.0] * len(PIPES)
    busy = [0.0] * len(PIPES)
    now, issued = 0.0, 0
    arrived: dict[int, list[_Warp]] = {slot: [] for slot in range(residents)}
    finished: dict[int, list[float]] = {slot: [] for slot in range(residents)}
    durations: list[float] = []
    ended: list[float] = []
    seen: dict[int, list[list[float]]] = {}  # per loop and warp the times at which iterations ended
    own: dict[tuple[int, int, int], list[float]] = {}
    live = list(all_warps)
    while live:
        best, start = None, 0.0
        for warp in live:
            if warp.waiting:
                continue
            one, price = steps[warp.at]
            time = warp.ready
            for barrier in one.waits:
                if warp.barriers[barrier] > time:
                    time = warp.barriers[barrier]
            if price.what in ("plain", "result", "copy") and price.pipes:
                pipe = price.pipes[0][0]
                limit = free[pipe] - QUEUES[pipe]
                if limit > time:
                    time = limit
            elif price.what == "wait" and len(warp.copies) > price.number:
                time = max(time, *warp.copies[: len(warp.copies) - price.number])
            elif price.what == "group wait" and len(warp.groups) > price.number:
                time = max(time, *warp.groups[: len(warp.groups) - price.number])
            if best is None or time < start:
                best, start = warp, time
        if best is None:
            raise NotUnderstood("all warps wait for each other")
        warp = best
        one, price = steps[warp.at]
        now = max(now, start)
        issued += 1
        done_at = now + price.latency
        if price.pipes:
            begins = now
            for pipe, clocks in price.pipes:
                begins_here = max(now, free[pipe])
                free[pipe] = begins_here + clocks
                busy[pipe] += clocks
                if pipe == price.pipes[0][0]:
                    begins = free[pipe]
            done_at = begins + price.latency
        if price.what == "copy":
            warp.copied = max(warp.copied, done_at)
        elif price.what == "commit":
            warp.copies.append(warp.copied)
        elif price.what == "group":
            warp.group = done_at
            if price.number:
                warp.groups.append(warp.group)
        if one.sets != NONE:
            warp.barriers[one.sets] = max(warp.barriers[one.sets], done_at)
        if one.frees != NONE:
            warp.barriers[one.frees] = max(warp.barriers[one.frees], now + READ_LATENCY)
        warp.ready = now + max(one.stall, 1)
        if one.base == "CALL":
            warp.ready = now + CALL
        if warp.at in ends:
            own.setdefault((id(warp), len(finished[warp.slot]), ends[warp.at]), []).append(now)
        now += BESIDE_PRODUCTS if free[_TENSOR] > now else 1
        if price.what == "barrier":
            group = arrived[warp.slot]
            group.append(warp)
            warp.waiting = True
            if len(group) == warps:
                for other in group:
                    other.waiting, other.ready = False, now + price.latency
                arrived[warp.slot] = []
        warp.at += 1
        if warp.at == len(steps):
            warp.waiting = True
            group = arrived[warp.slot]
            group.append(warp)
            if len(group) == warps:
                durations.append(now - min(other.begun for other in group))
                ended.append(now)
                finished[warp.slot].append(now)
                arrived[warp.slot] = []
                if len(finished[warp.slot]) < repeats:
                    for other in group:
                        other.begin(now)
                else:
                    live = [other for other in live if other.slot != warp.slot]
    for (_, _, number), times in own.items():
        seen.setdefault(number, []).append(times)
    iteration = {number: _in_the_long_run(runs) for number, runs in seen.items()}
    return Times(durations, ended, iteration, busy, issued, now)


def _in_the_long_run(runs: list[list[float]]) -> float:
    """Clocks between the ends of iterations, without a run's first ones."""
    gaps = []
    for times in runs:
        half = len(times) // 2
        if len(times) > 1:
            gaps.append((times[-1] - times[half - 1]) / (len(times) - half))
    return sum(gaps) / len(gaps) if gaps else 0.0
