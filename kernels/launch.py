"""How a kernel is launched: with which blocks, and how to compile the same launch without running it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .arguments import block_of, cdiv, constant
from .blocks import Blocks, blocks_for
from .target import current_target

MULTIPROCESSORS = 132  # of an H100, and near enough for others: a tile more or less to each costs little
MOST_PREFIX_ROWS = 64  # of a tile that was made lower
SMALLEST = 16  # rows of a tile: the least that matrix units take


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


def over_queries(kernel: Any, call: Any, direction: str, arguments: dict[str, Any]) -> Launch:
    """A kernel whose programs each have one tile of queries of one head (`tiles.query_tile`)."""
    B, Hq, N, _ = call.query.shape
    variant, options = variant_for(call, direction)
    programs = B * Hq * cdiv(N, variant.BLOCK_N)
    return Launch(kernel, programs, {**arguments, "variant": variant.marked()}, options)


def over_stacked_rows(kernel: Any, call: Any, direction: str, arguments: dict[str, Any]) -> Launch:
    """A kernel over the prefix whose programs each have one tile of a key head's queries (`tiles.stacked_rows`)."""
    B, Hq, N, _ = call.query.shape
    Hkv = call.key.shape[1]
    count = B * (Hq // Hkv) * N
    blocks = blocks_of(call, direction)
    queries = _filling(blocks.queries, count, Hkv)
    # Where there are fewer queries in a tile there is room for more of the prefix: fewer steps one after the other.
    prefix = min(blocks.prefix * blocks.queries // queries, MOST_PREFIX_ROWS)
    variant = Variant(
        CAUSAL=False,
        HAS_MASK=False,
        PRECISION=_precision(call.query.dtype),
        EXACT=is_exact(call),
        BLOCK_N=queries,
        BLOCK_M=0,
        BLOCK_P=at_most(max(prefix, blocks.prefix), call.prefix_key.shape[-2]),
    )
    warps = min(blocks.warps, max(4, blocks.warps * queries // blocks.queries))
    options = {"num_warps": warps, "num_stages": blocks.stages}
    programs = Hkv * cdiv(count, queries)
    return Launch(kernel, programs, {**arguments, "variant": variant.marked()}, options)


def variant_for(call: Any, direction: str) -> tuple[Variant, dict[str, int]]:
    """The variant of an attention kernel that a call needs, with the table's blocks, and its launch options."""
    N, P = call.query.shape[2], call.prefix_key.shape[-2]
    blocks = blocks_of(call, direction)
    variant = Variant(
        CAUSAL=call.is_causal,
        HAS_MASK=call.padding_mask is not None or call.attn_mask is not None,
        PRECISION=_precision(call.query.dtype),
        EXACT=is_exact(call),
        BLOCK_N=at_most(blocks.queries, N),
        BLOCK_M=blocks.keys,
        BLOCK_P=at_most(blocks.prefix, P),
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return variant, options


def is_exact(call: Any) -> bool:
    """Whether scores may be large: in float32, and under what is added to them."""
    overlays = (call.padding_mask, call.attn_mask, call.prefix_bias)
    return call.query.dtype == torch.float32 or any(x is not None and x.dtype != torch.bool for x in overlays)


def blocks_of(call: Any, direction: str) -> Blocks:
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
