"""How kernels are launched: with which blocks, and a pass of several of them as one that may be run again.

What a launch takes beside pointers follows from shapes, strides, dtypes and a call's numbers, which models repeat in
every layer and step. Building it costs the host as much as launching it, and Triton, which looks at every leaf of it to
find the compiled kernel, costs twice that. So the launches of a pass are kept under all that decides about them, their
compiled kernels with them, and of their arguments only the pointers are put in again.

A pass is kept only if every pointer that it launches with is one of its arguments or of its own scratch. The copy of a
tensor that kernels cannot read in place is neither: such a pass is built each time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from . import blocks
from .arguments import Call, block_of, cdiv, constant, is_scratch
from .blocks import Blocks, blocks_for
from .target import INTERPRETED, current_target

MULTIPROCESSORS = 132  # of an H100, and near enough for others: a tile more or less to each costs little
MOST_PREFIX_ROWS = 64  # of a tile that was made lower
SMALLEST = 16  # rows of a tile: the least that matrix units take
MOST_PASSES = 1024  # that are kept
ALIGNED = 16  # bytes; by this Triton tells pointers apart

# On AMD Triton also looks at how large the memory behind a pointer is. In the interpreter there is nothing to gain.
enabled = not INTERPRETED and torch.version.hip is None


class Variant(NamedTuple):
    """What the attention kernels know when they are compiled, beside head sizes and what is None."""

    CAUSAL: Any
    HAS_MASK: Any  # on the context
    PRECISION: Any  # of products of float32
    EXACT: Any  # s - m before anything is multiplied; see forward.py
    BLOCK_N: Any  # queries
    BLOCK_M: Any  # context keys; 0 where none are read
    BLOCK_P: Any  # prefix rows

    def marked(self) -> "Variant":
        """As kernels take it."""
        return Variant(*map(constant, self))


@dataclass(frozen=True)
class Launch:
    """One kernel, its grid and all it takes."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages

    def run(self) -> Any:
        """The compiled kernel; None where no program runs, and in the interpreter."""
        return self.kernel[(self.programs,)](**self.arguments, **self.options) if self.programs else None

    def compile(self) -> Any:
        """The kernel compiled for the active driver's target; tensors may be on the meta device."""
        return self.kernel.warmup(grid=(max(self.programs, 1),), **self.arguments, **self.options)


def over_queries(kernel: Any, call: Call, direction: str, arguments: dict[str, Any]) -> Launch:
    """A kernel whose programs each have one tile of queries of one head (`tiles.query_tile`)."""
    B, Hq, N, _ = call.query.shape
    variant, options = variant_for(call, direction)
    programs = B * Hq * cdiv(N, variant.BLOCK_N)
    return Launch(kernel, programs, {**arguments, "variant": variant.marked()}, options)


def over_stacked_rows(kernel: Any, call: Call, direction: str, arguments: dict[str, Any]) -> Launch:
    """A kernel over the prefix whose programs each have one tile of a key head's queries (`tiles.stacked_rows`)."""
    B, Hq, N, _ = call.query.shape
    Hkv = call.key.shape[1]
    count = B * (Hq // Hkv) * N
    sizes = blocks_of(call, direction)
    queries = _filling(sizes.queries, count, Hkv)
    # Where there are fewer queries in a tile there is room for more of the prefix: fewer steps one after the other.
    prefix = min(sizes.prefix * sizes.queries // queries, MOST_PREFIX_ROWS)
    variant = Variant(
        CAUSAL=False,
        HAS_MASK=False,
        PRECISION=_precision(call.query.dtype),
        EXACT=is_exact(call),
        BLOCK_N=queries,
        BLOCK_M=0,
        BLOCK_P=at_most(max(prefix, sizes.prefix), call.prefix_key.shape[-2]),
    )
    warps = min(sizes.warps, max(4, sizes.warps * queries // sizes.queries))
    options = {"num_warps": warps, "num_stages": sizes.stages}
    programs = Hkv * cdiv(count, queries)
    return Launch(kernel, programs, {**arguments, "variant": variant.marked()}, options)


def variant_for(call: Call, direction: str) -> tuple[Variant, dict[str, int]]:
    """The variant of an attention kernel that a call needs, with the table's blocks, and its launch options."""
    N, P = call.query.shape[2], call.prefix_key.shape[-2]
    sizes = blocks_of(call, direction)
    variant = Variant(
        CAUSAL=call.is_causal,
        HAS_MASK=call.padding_mask is not None or call.attn_mask is not None,
        PRECISION=_precision(call.query.dtype),
        EXACT=is_exact(call),
        BLOCK_N=at_most(sizes.queries, N),
        BLOCK_M=sizes.keys,
        BLOCK_P=at_most(sizes.prefix, P),
    )
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    return variant, options


def is_exact(call: Call) -> bool:
    """Whether scores may be large: in float32, and under what is added to them."""
    overlays = (call.padding_mask, call.attn_mask, call.prefix_bias)
    return call.query.dtype == torch.float32 or any(x is not None and x.dtype != torch.bool for x in overlays)


def blocks_of(call: Call, direction: str) -> Blocks:
    head_size = max(block_of(call.query.shape[-1]), block_of(call.value.shape[-1]))
    return blocks_for(current_target(), call.query.element_size(), head_size, direction)


def _filling(block: int, count: int, heads: int) -> int:
    """A block of `count` rows a head so small that every multiprocessor has one, as far as there are so many rows."""
    while block > SMALLEST and heads * cdiv(count, block) < MULTIPROCESSORS:
        block //= 2
    return block


def at_most(block: int, size: int) -> int:
    """A block no larger than `size` needs."""
    return min(block, block_of(max(size, 1)))


def _precision(dtype: torch.dtype) -> str:
    """Of products of float32: what PyTorch's own matrix products are set to, where the hardware has it."""
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32" if current_target().startswith(("sm_", "gfx942")) else "ieee"


# Passes that are run again

Step = tuple[Callable[..., Any], Callable[[list[Tensor]], tuple[Any, ...]]]


@dataclass(frozen=True)
class Replay:
    """The launches of one pass.

    Args:
        scratch: shape and dtype of what it allocates for itself.
        steps: what launches a kernel, and what makes its arguments of all tensors, the scratch behind those handed in.
    """

    scratch: list[tuple[torch.Size, torch.dtype]]
    steps: list[Step]

    def run(self, tensors: list[Tensor]) -> None:
        new_empty = tensors[0].new_empty
        everything = [*tensors, *[new_empty(shape, dtype=dtype) for shape, dtype in self.scratch]]
        for launch, arguments in self.steps:
            launch(*arguments(everything))


_kept: dict[Any, Any] = {}  # a Replay; None: it cannot be one; _SEEN_ONCE


def run(name: str, call: Call, others: Sequence[Tensor | None], launches: Callable[[], Iterable[Launch]]) -> None:
    """Runs the launches of a pass, or an earlier one's in their stead.

    Args:
        name: of the pass; it and the other arguments decide about all launches, but for their pointers.
        others: what they read and write beside the call's own tensors.
        launches: builds them.
    """
    if not enabled:
        for launch in launches():
            launch.run()
        return
    key, tensors = _key(name, call, others)
    replay = _kept.get(key, _UNKNOWN)
    if replay is _SEEN_ONCE:
        _kept[key] = _recorded(tensors, launches())
    elif isinstance(replay, Replay):
        replay.run(tensors)
    else:
        if replay is _UNKNOWN:
            if len(_kept) >= MOST_PASSES:
                del _kept[next(iter(_kept))]  # the oldest
            _kept[key] = _SEEN_ONCE
        for launch in launches():
            launch.run()


_UNKNOWN: Any = object()
_SEEN_ONCE: Any = object()  # in decoding each token has another length: what does not come again is not recorded


def _key(name: str, call: Call, others: Sequence[Tensor | None]) -> tuple[Any, list[Tensor]]:
    """All that decides about a pass but the pointers; and its tensors."""
    given = (*vars(call).values(), *others)
    tensors = [x for x in given if isinstance(x, Tensor)]
    facts = tuple([(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in given])
    bits = 0
    for x in tensors:
        bits |= x.data_ptr()
    unaligned = tuple([x.data_ptr() % ALIGNED for x in tensors]) if bits % ALIGNED else None
    precision = torch.backends.cuda.matmul.fp32_precision if call.query.dtype == torch.float32 else None
    driver = None if INTERPRETED else triton.runtime.driver.active
    device = None if driver is None else driver.get_current_device()
    return (name, facts, unaligned, precision, driver, device, blocks.edition()), tensors


def _recorded(tensors: list[Tensor], launches: Iterable[Launch]) -> Replay | None:
    """Runs them; None if they cannot be run again with other tensors."""
    places = _Places(tensors)
    steps = []
    for launch in launches:
        compiled = launch.run()
        if launch.programs:
            steps.append((_launcher(launch, compiled), places.filler(launch)))
    known = places.known and all(launcher is not None for launcher, _ in steps)
    return Replay([(x.shape, x.dtype) for x in places.scratch], steps) if known else None


def _launcher(launch: Launch, compiled: Any) -> Any:
    """What launches it with other arguments; None if it was compiled in some way that is not known here."""
    if INTERPRETED:
        kernel, programs, options = launch.kernel, launch.programs, launch.options
        return lambda *arguments: kernel[(programs,)](*arguments, **options)
    return compiled[(launch.programs, 1, 1)] if isinstance(compiled, CompiledKernel) else None


class _Places:
    """Where a pass's tensors stand in its launches."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self.scratch = tensors, list[Tensor]()
        pointers = [x.data_ptr() for x in tensors if x.numel()]
        self.known = len(set(pointers)) == len(pointers)  # else one could stand for another

    def filler(self, launch: Launch) -> Callable[[list[Tensor]], tuple[Any, ...]]:
        """What makes a launch's arguments, in the order of the kernel's, of all tensors: a function written for it."""
        constants: dict[str, Any] = {"new": tuple.__new__}
        found = [self._source(launch.arguments[name], constants) for name in launch.kernel.arg_names]
        return eval(f"lambda t: ({', '.join(found)},)", constants)

    def _source(self, x: Any, constants: dict[str, Any]) -> str:
        if isinstance(x, Tensor):
            place = self._place(x)
            same = place >= len(self.tensors) or self.tensors[place].dtype == x.dtype
            return f"t[{place}]" if same else f"t[{place}].view({_constant(x.dtype, constants)})"
        if isinstance(x, tuple) and any(True for _ in _tensors(x)):
            inner = "".join(f"{self._source(each, constants)}, " for each in x)
            if not INTERPRETED:
                return f"({inner})"  # a compiled kernel knows no names
            return f"new({_constant(type(x), constants)}, ({inner}))"
        return _constant(x, constants)

    def _place(self, x: Tensor) -> int:
        everything = [*self.tensors, *self.scratch]
        for place, other in enumerate(everything):
            if other is x or (x.numel() and other.numel() and other.data_ptr() == x.data_ptr()):
                return place
        self.known &= is_scratch(x)
        self.scratch.append(x)
        return len(everything)


def _constant(x: Any, constants: dict[str, Any]) -> str:
    name = f"c{len(constants)}"
    constants[name] = x
    return name


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple):
        for each in x:
            yield from _tensors(each)
