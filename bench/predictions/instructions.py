"""What the instructions of Hopper cost: how long each keeps a pipe busy, and when its result is ready.

Times are clocks of a quarter of a multiprocessor, which has its own scheduler, arithmetic pipes and tensor core, and a
quarter of what is shared (multiprocessor.py).
"""

from dataclasses import dataclass

from qtuning_fast.bench.predictions.sass import CodeError, Instruction

QUARTERS = 4
LANES = 32  # of a warp
SECTOR = 32  # bytes: the least that is read
SHARED_BYTES = 128 / QUARTERS  # a clock: NVIDIA, "Hopper tuning guide"

# Clocks that a warp's instruction keeps its pipe: 32 over lanes in a quarter. From the results a clock of a
# multiprocessor of compute capability 9.0 in NVIDIA's "CUDA C++ Programming Guide", arithmetic instructions.
FMA, HALF, SPECIAL, UNIFORM = 1, 2, 8, 2
TENSOR_FMA = 512  # 16-bit products and sums a clock: 4,096 operations a clock of a multiprocessor
MMA_SHARE = 0.62  # of that by the older warp-wide HMMA: Luo et al., arXiv 2402.13499, table of mma and wgmma

# Clocks of the scheduler that an instruction takes while the tensor core works. HGMMA's sums lie in registers: 16 rows
# of N float32 are read and written in N/2 clocks, 128 bytes a clock each way, as much as another instruction takes.
# Assumed; no source says it.
BESIDE_PRODUCTS = 2

# Clocks from issue to result where the compiler leaves it to a barrier. Shared memory: Luo et al., arXiv 2402.13499.
# Special functions, shuffles and the like: as Jia et al. found on Volta, arXiv 1804.06826, and near enough since.
SHARED_LATENCY, SPECIAL_LATENCY, SHUFFLE_LATENCY, OTHER_LATENCY = 29, 20, 23, 20
FIRST_LEVEL_LATENCY = 41  # there
GROUP_LATENCY = 32  # of HGMMA beyond the time of its products: m64n8k16 takes as long, arXiv 2402.13499
READ_LATENCY = 12  # until an instruction's operands have been read
BARRIER_LATENCY = 20  # from the last warp's arrival until all go on
FENCE_LATENCY = 20
NEXT_PROGRAM = (
    800  # from a program's last instruction to its successor's first: stores arrive, a new one is set up; assumed
)
CALL = 60  # clocks of a subroutine: 64-bit division

# fmt: off
_ALU = frozenset([
    "FMNMX", "FSEL", "FSETP", "FSET", "FCHK", "ISETP", "IADD3", "VIADD", "VIADDMNMX", "VIMNMX", "IMNMX", "IABS", "LOP3",
    "PLOP3", "SHF", "LEA", "SEL", "SGXT", "PRMT", "MOV", "P2R", "R2P", "F2FP", "F2F", "I2FP", "FLO", "BMSK", "CS2R",
    "HMNMX2", "HSETP2",
])
# fmt: on
_FMA = frozenset(["FFMA", "FMUL", "FADD", "FFMA32I", "FMUL32I", "FADD32I"])
_FMA_HALF = frozenset(["IMAD", "HFMA2", "HADD2", "HMUL2", "IDP"])
_SPECIAL = frozenset(["MUFU", "I2F", "F2I", "POPC", "FRND", "BREV"])
_GLOBAL_LOADS = frozenset(["LDG", "LD"])
_GLOBAL_STORES = frozenset(["STG", "ST", "RED", "ATOMG", "ATOM"])
_SHARED = frozenset(["LDS", "STS", "LDSM", "STSM", "ATOMS"])
_GROUP_PRODUCTS = frozenset(["HGMMA", "QGMMA", "IGMMA"])
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

PIPES = ("fp32", "alu", "special", "uniform", "tensor", "shared", "global")
_FP32, _ALU_PIPE, _SPECIAL_PIPE, _UNIFORM_PIPE, TENSOR, _SHARED_PIPE, _GLOBAL = range(len(PIPES))

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
    """The pipes, the latency and the kind of an instruction."""

    what: str  # "plain", "result", "copy", "commit", "wait", "group", "group wait", "barrier", "end"
    pipes: tuple[tuple[int, float], ...] = ()  # and the clocks that it keeps each
    latency: float = 0  # until its result is there
    number: int = 0  # of groups that may be under way still


NOTHING = Cost("plain")


def cost(one: Instruction, memory: Memory) -> Cost:
    """The cost of an instruction."""
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
        return Cost("result", ((_GLOBAL, clocks),), memory.latency if base in _GLOBAL_LOADS else OTHER_LATENCY)
    if base == "LDGSTS":
        size = bytes_of(one)
        return Cost(
            "copy", ((_GLOBAL, size / memory.bytes_a_clock), (_SHARED_PIPE, size / SHARED_BYTES)), memory.latency
        )
    if base in ("LDL", "STL"):  # spilled registers, as far as the first-level cache holds them
        return Cost("result", ((_SHARED_PIPE, _width(one) * LANES / SHARED_BYTES),), FIRST_LEVEL_LATENCY)
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
    if base.startswith(("UTMA", "SYNCS")):
        raise CodeError(f"{one.name}: copies by the tensor memory accelerator are not modelled")
    if base.startswith("U"):
        return Cost("plain", ((_UNIFORM_PIPE, UNIFORM),), OTHER_LATENCY)
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
    pipes = ((TENSOR, max(tensor, shared_clocks)), (_SHARED_PIPE, shared_clocks))
    return Cost("group", pipes, GROUP_LATENCY, number=int("gsb0" in one.operands))


def _warp_product(one: Instruction) -> Cost:
    """HMMA.16816 and similar: m16n8k16 of a warp."""
    shape = one.name.split(".")[1]
    m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "1684": (16, 8, 4)}.get(
        shape, (16, 8, 16)
    )
    width = 2 if ".TF32" in one.name else 1
    return Cost("plain", ((TENSOR, m * n * k * width / TENSOR_FMA / MMA_SHARE),), SHARED_LATENCY)


def _width(one: Instruction) -> int:
    return next((size for part, size in _WIDTHS.items() if part in one.name.split(".")[1:]), 4)


def _last_number(one: Instruction) -> int:
    return int(one.operands.rsplit(",", 1)[-1].strip(), 0)
