"""Launches of kernels: their block sizes, and replay of the launches of a pass.

Apart from pointers, a launch depends on shapes, strides, dtypes and a call's numbers, which models repeat in every
layer and step. Building it costs the host as much as launching it, and Triton, which examines every leaf of the
arguments to find the compiled kernel, costs twice that. So the launches of a pass are cached with their compiled
kernels, under everything that determines them, and a replay replaces only the pointers.

A pass is cached only if every pointer belongs to one of its arguments or to its own scratch memory. The copy of a
tensor that kernels cannot read in place belongs to neither, so such a pass is built each time.
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

MULTIPROCESSORS = 132  # of an H100, and close enough for others: one tile more or less for each costs little
MOST_PREFIX_ROWS = 64  # of a tile with fewer queries than the table's
SMALLEST = 16  # rows of a tile, the minimum of matrix units
MOST_PASSES = 1024  # capacity of the cache
ALIGNED = 16  # bytes; Triton specialises kernels on this alignment of pointers

# On AMD Triton also specialises on the size of the memory behind a pointer. The interpreter has nothing to gain.
enabled = not INTERPRETED and torch.version.hip is None


class Variant(NamedTuple):
    """The compile-time arguments of the attention kernels, beside head sizes and pointers that are None."""

    HAS_MASK: Any  # on the context
    PRECISION: Any  # of products of float32
    EXACT: Any  # computes s - m before any multiplication; see forward.py
    BLOCK_N: Any  # queries
    BLOCK_M: Any  # context keys; 0 where none are read
    BLOCK_P: Any  # prefix rows

    def marked(self) -> "Variant":
        """Return the variant as kernels take it."""
        return Variant(*map(constant, self))


@dataclass(frozen=True)
class Launch:
    """One kernel, its grid and its arguments."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages

    def run(self) -> Any:
        """Run it and return the compiled kernel; None if no program runs, and in the interpreter."""
        return self.kernel[(self.programs,)](**self.arguments, **self.options) if self.programs else None

    def compile(self) -> Any:
        """Compile the kernel for the active driver's target; tensors may be on the meta device."""
        return self.kernel.warmup(grid=(max(self.programs, 1),), **self.arguments, **self.options)


def over_queries(kernel: Any, call: Call, direction: str, arguments: dict[str, Any]) -> Launch:
    """Return the launch of a kernel whose programs have one tile of queries of one head (`tiles.query_tile`)."""
    (B, N, _), Hq = call.counts, call.query.shape[1]
    variant, options = variant_for(call, direction)
    programs = B * Hq * cdiv(N, variant.BLOCK_N)
    return Launch(kernel, programs, {**arguments, "variant": variant.marked()}, options)


def over_stacked_rows(kernel: Any, call: Call, direction: str, arguments: dict[str, Any]) -> Launch:
    """Return the launch of a kernel over the prefix, one tile of a key head's queries each (`tiles.stacked_rows`)."""
    B, Hq, N, _ = call.query.shape
    Hkv = call.key.shape[1]
    count = B * (Hq // Hkv) * N
    sizes = blocks_of(call, direction)
    queries = _filling(sizes.queries, count, Hkv)
    # A tile with fewer queries has room for more rows of the prefix, so the loop over it has fewer steps.
    prefix = min(sizes.prefix * sizes.queries // queries, MOST_PREFIX_ROWS)
    variant = Variant(
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
    """Return the variant of an attention kernel for a call, with the table's blocks, and its launch options."""
    (_, N, _), P = call.counts, call.prefix_key.shape[-2]
    sizes = blocks_of(call, direction)
    variant = Variant(
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
    """Return whether to use the variant EXACT: in float32, and under additive masks or bias."""
    overlays = (call.padding_mask, call.attn_mask, call.prefix_bias)
    return call.query.dtype == torch.float32 or any(x is not None and x.dtype != torch.bool for x in overlays)


def blocks_of(call: Call, direction: str) -> Blocks:
    head_size = max(block_of(call.query.shape[-1]), block_of(call.value.shape[-1]))
    return blocks_for(current_target(), call.query.element_size(), head_size, direction)


def _filling(block: int, count: int, heads: int) -> int:
    """Reduce a block over `count` rows a head until every multiprocessor has a block, if there are enough rows."""
    while block > SMALLEST and heads * cdiv(count, block) < MULTIPROCESSORS:
        block //= 2
    return block


def at_most(block: int, size: int) -> int:
    """Return the smaller of a block and the power of 2 that holds `size`."""
    return min(block, block_of(max(size, 1)))


def _precision(dtype: torch.dtype) -> str:
    """Return the precision of float32 products: PyTorch's setting for its own, if the hardware supports it."""
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    return "tf32" if current_target().startswith(("sm_", "gfx942")) else "ieee"


# Replay of passes

Step = tuple[Callable[..., Any], Callable[[list[Tensor]], tuple[Any, ...]]]


@dataclass(frozen=True)
class Replay:
    """The launches of one pass.

    Args:
        scratch: shape and dtype of each scratch tensor that it allocates.
        steps: for each kernel, its launcher and the function that makes its arguments from all tensors, scratch last.
    """

    scratch: list[tuple[torch.Size, torch.dtype]]
    steps: list[Step]

    def run(self, tensors: list[Tensor]) -> None:
        new_empty = tensors[0].new_empty
        everything = [*tensors, *[new_empty(shape, dtype=dtype) for shape, dtype in self.scratch]]
        for launch, arguments in self.steps:
            launch(*arguments(everything))


_kept: dict[Any, Any] = {}  # values: a Replay; None if the pass cannot be replayed; _SEEN_ONCE


def run(name: str, call: Call, others: Sequence[Tensor | None], launches: Callable[[], Iterable[Launch]]) -> None:
    """Run the launches of a pass, or replay those of an earlier equal pass.

    Args:
        name: name of the pass; with the other arguments it determines all launches except their pointers.
        others: tensors that the launches read and write beside the call's own.
        launches: builds the launches.
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
_SEEN_ONCE: Any = object()  # decoding has a new length for each token: a pass that does not recur is not recorded


def _key(name: str, call: Call, others: Sequence[Tensor | None]) -> tuple[Any, list[Tensor]]:
    """Return everything that determines a pass except its pointers, and its tensors."""
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
    """Run the launches and record them; return None if they cannot be replayed with other tensors."""
    places = _Places(tensors)
    steps = []
    for launch in launches:
        compiled = launch.run()
        if launch.programs:
            steps.append((_launcher(launch, compiled), places.filler(launch)))
    known = places.known and all(launcher is not None for launcher, _ in steps)
    return Replay([(x.shape, x.dtype) for x in places.scratch], steps) if known else None


def _launcher(launch: Launch, compiled: Any) -> Any:
    """Return a function that launches the kernel with other arguments; None if its compiled form is not supported."""
    if INTERPRETED:
        kernel, programs, options = launch.kernel, launch.programs, launch.options
        return lambda *arguments: kernel[(programs,)](*arguments, **options)
    return compiled[(launch.programs, 1, 1)] if isinstance(compiled, CompiledKernel) else None


class _Places:
    """The places of a pass's tensors in its launches."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self.scratch = tensors, list[Tensor]()
        pointers = [x.data_ptr() for x in tensors if x.numel()]
        self.known = len(set(pointers)) == len(pointers)  # otherwise places would be ambiguous

    def filler(self, launch: Launch) -> Callable[[list[Tensor]], tuple[Any, ...]]:
        """Return a generated function from all tensors to a launch's arguments, in the order of the kernel's."""
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
                return f"({inner})"  # a compiled kernel takes plain tuples
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
