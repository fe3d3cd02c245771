"""The arguments of the kernels: named tuples of pointers and strides, made from tensors.

`Call` lists what the launchers read of a call. Strides count elements; the last dimension is always contiguous. Fields
marked "compile-time" are known when a kernel is compiled, and so is whether a pointer is None. A pointer is None if the
call lacks that tensor, so one kernel serves all variants. (Only pointers are None, never tuples: Triton 3.6 cannot
compare every tuple with None.)

A tuple that holds tuples ends with `end`, which is always None. Triton 3.6 copies the variables of a branch or a loop;
without `end`, its copy loses which fields of the inner tuples are compile-time.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import triton.language as tl
from torch import Tensor

from .target import current_target

LARGEST_TILE = 128  # queries
_LARGEST_STRIDE = 1 << 22  # between rows: the offset of a row within a tile, at most 256 of them, stays below 2**31


class Call(Protocol):
    """One call of prefix attention, checked: a dataclass (`PrefixAttentionCall` in qtuning_fast/attention).

    Sizes: `B` samples, `N` queries, `M` context keys, `P` prefix rows, `Hq` and `Hkv` heads, `T` prefixes in a bank,
    `R` rank.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    query: Tensor  # [B, Hq, N, D]
    key: Tensor  # [B, Hkv, M, D]
    value: Tensor  # [B, Hkv, M, Dv]
    prefix_key: Tensor  # [Hkv, P, D], a bank: [T, Hkv, P, D]
    prefix_value: Tensor
    prefix_index: Tensor | None  # [B], packed [S], with a bank only; its range is unchecked
    prefix_length: Tensor | None  # [T]
    cu_seqlens_query: Tensor | None  # [S + 1], offsets of packed sequences, unchecked; B is then 1
    padding_mask: Tensor | None  # [B, M], bool or additive
    attn_mask: Tensor | None  # [B, Hq, N, M]; any dimension may be 1; beside a padding_mask both apply
    prefix_bias: Tensor | None  # [B, Hq, N, P]; any dimension may be 1
    sink: Tensor | None  # [Hq]
    n_shared: int
    gate: str | None
    scale: float
    softcap: float | None

    @property
    def counts(self) -> tuple[int, int, int]: ...  # B, N, M; of packed sequences their number, the rows of the longest

    @property
    def key_offsets(self) -> Tensor | None: ...  # [S + 1], of packed sequences

    @property
    def keys_before(self) -> int | None: ...  # how many keys before its position a query sees; None: all

    @property
    def keys_after(self) -> int | None: ...  # and after it; 0 under causality

    @property
    def reweight_key(self) -> tuple[Tensor, Tensor] | None: ...  # U [P, R], V [R, Hkv, D], a bank: with a leading T

    @property
    def reweight_value(self) -> tuple[Tensor, Tensor] | None: ...

    @property
    def alpha(self) -> float | Tensor: ...  # a tensor: [] or [Hq], with a bank also [T, 1] or [T, Hq]

    @property
    def tau(self) -> float | Tensor: ...


class Rows(NamedTuple):
    """[outer, head, row, D]; outer is the sample or, for a prefix, its index in the bank. Pointer None: not needed."""

    pointer: Any
    outer: int
    head: int
    row: int
    D: Any  # compile-time
    BLOCK_D: Any  # compile-time; the power of 2 that holds D


class LowRank(NamedTuple):
    """W = U V with U [T, P, R] and V [T, R, Hkv, D]. Pointers None: all weights are 1."""

    U: Any
    U_prefix: int
    U_row: int
    V: Any
    V_prefix: int
    V_rank: int
    V_head: int
    rank: Any  # compile-time


class Stored(NamedTuple):
    """The stored keys or values of the prefix, and their weights."""

    rows: Rows
    weights: LowRank
    end: None = None


class Prefix(NamedTuple):
    """The prefix as attention sees it: k' and v', which `fold` makes from stored rows."""

    key: Rows
    value: Rows
    index: Any  # [B], None without a bank
    length: Any  # [T]; None: P for all
    n_prefixes: int  # T
    n_rows: int  # P
    end: None = None


class Parameter(NamedTuple):
    """alpha or tau: a tensor over prefixes and heads or, if the pointer is None, one value."""

    pointer: Any
    prefix: int
    head: int
    value: float


class Gate(NamedTuple):
    name: Any  # compile-time; "none": no gate
    fast_tanh: Any  # compile-time
    alpha: Parameter
    tau: Parameter
    end: None = None


class Overlay(NamedTuple):
    """A mask or bias on scores [B, Hq, N, keys]: a dimension that broadcasts has stride 0; uint8 means bool."""

    pointer: Any
    sample: int
    head: int
    query: int
    key: int


class Masks(NamedTuple):
    padding: Overlay  # [B, M]
    full: Overlay
    bias: Overlay  # on the prefix
    end: None = None


class PerQuery(NamedTuple):
    """Float32 tensors [B, Hq, N] that one pass writes and another reads."""

    lse: Any  # natural; -inf for a query that sees nothing
    rest: Any  # the log-sum-exp's rounding residual; present if EXACT
    delta: Any  # rowsum(dO ∘ O); None in the forward pass


class Scaling(NamedTuple):
    factor: float
    cap: Any  # None: scores are not capped


class Span(NamedTuple):
    """The rows of one sample, or of one packed sequence.

    The outer indices are the sample or, if sequences are packed, the first row of this one: the outer stride is then
    that of rows. (A function of a kernel cannot return other `Sizes`: Triton 3.6 returns no tuple that holds None.)
    """

    N: Any  # queries
    M: Any  # keys
    queries: Any  # the outer index of query and of what has its rows
    keys: Any  # and of key and value


class Sizes(NamedTuple):
    B: int  # or the number of packed sequences
    N: int  # of the longest, if sequences are packed
    M: int
    heads: int  # Hq
    group: int  # G
    before: Any = None  # the keys before its position that a query sees; None: all
    after: Any = None  # and after it; compile-time if 0
    query_offsets: Any = None  # [S + 1]; None: no packed sequences
    key_offsets: Any = None
    queries: int = 0  # of all packed sequences
    keys: int = 0


def attention(call: Call) -> dict[str, Any]:
    """Return the arguments that the attention kernels share, by name, for a call with a folded prefix."""
    return {
        "query": rows(call.query),
        "key": rows(call.key),
        "value": rows(call.value),
        "prefix": prefix(call),
        "gate": gate(call),
        "masks": masks(call),
        "sizes": sizes(call),
        "scaling": scaling(call),
    }


def attention_to_prefix(call: Call) -> dict[str, Any]:
    """Return the same for the kernels without a context."""
    return {
        "query": rows(call.query),
        "prefix": prefix(call),
        "gate": gate(call),
        "masks": Masks(_NO_OVERLAY, _NO_OVERLAY, _overlay(call.prefix_bias)),
        "sizes": sizes(call)._replace(before=None, after=None),
        "scaling": scaling(call),
    }


def samples_by_prefix(call: Call) -> Tensor | None:
    """Return the samples [B] sorted by prefix, without the host waiting; None: unsorted.

    It is None without a bank, and if a single sample fills tiles, so that few tiles have rows of several samples.
    """
    Hq, N = call.query.shape[1:3]
    assert call.cu_seqlens_query is None, "stacked rows know no packed sequences"
    if call.prefix_index is None or Hq // call.key.shape[1] * N >= LARGEST_TILE:
        return None
    return torch.argsort(call.prefix_index.long().clamp(0, n_prefixes(call) - 1), stable=True)


def rows(x: Tensor) -> Rows:
    """Return a tensor [outer, head, row, D], or [head, row, D] with outer always 0, as kernels read it.

    The tensor is copied if kernels cannot use its strides.
    """
    return _rows(x if in_reach(x) else x.contiguous())


def written_rows(x: Tensor | None) -> Rows:
    """Return a tensor [outer, head, row, D] as kernels write it."""
    if x is None:
        return _NO_ROWS
    assert in_reach(x), f"kernels cannot write strides {x.stride()}"
    return _rows(x)


def _rows(x: Tensor) -> Rows:
    D = x.shape[-1]
    outer, head, row, _ = (0, *x.stride())[-4:]
    if x.ndim == 4 and x.shape[0] == 1:
        outer = row  # of the one sample: the outer index is 0, or the first row of a packed sequence; see Span
    return Rows(x, outer, head, row, constant(D), constant(block_of(D)))


def empty_rows_like(x: Tensor) -> Tensor:
    """Allocate a gradient, in the memory order of x if kernels can write it."""
    room = torch.empty_like(x)
    return room if in_reach(room) else contiguous_like(x)


def contiguous_like(x: Tensor) -> Tensor:
    """Allocate a contiguous gradient."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def scratch(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate contiguous memory shared by the kernels of a pass; it is marked, so that a replay allocates its own."""
    room = like.new_empty(shape, dtype=dtype)
    room.is_scratch = True  # type: ignore[attr-defined]
    return room


def is_scratch(x: Tensor) -> bool:
    return getattr(x, "is_scratch", False)


def block_of(D: int) -> int:
    """Return the power of 2 that holds D, at least 16, the minimum of matrix units."""
    return 16 if D <= 16 else 1 << (D - 1).bit_length()


@lru_cache(maxsize=4096, typed=True)  # typed: 1 and True are different constants
def constant(value: Any) -> tl.constexpr:
    """Return a value as a compile-time argument, always the same object.

    Making one takes a microsecond, and so does comparing two, which Triton does for each of a launch.
    """
    return tl.constexpr(value)


def prefix(call: Call) -> Prefix:
    """Return the prefix of a folded call; for any other call its rows are not those that attention sees."""
    index, length = call.prefix_index, call.prefix_length
    return Prefix(
        key=rows(call.prefix_key),
        value=rows(call.prefix_value),
        index=None if index is None else index.contiguous(),
        length=None if length is None else length.contiguous(),
        n_prefixes=n_prefixes(call),
        n_rows=call.prefix_key.shape[-2],
    )


def stored(x: Tensor, weights: tuple[Tensor, Tensor] | None) -> Stored:
    """Return stored rows with their weights (U, V)."""
    return Stored(rows(x), _low_rank(weights))


def cdiv(count: int, block: int) -> int:
    """Return the number of blocks that hold `count`; triton.cdiv would take the host two microseconds."""
    return -(-count // block)


def n_prefixes(call: Call) -> int:
    return 1 if call.prefix_index is None else call.prefix_key.shape[0]


def gate(call: Call) -> Gate:
    # Its error of 2⁻¹¹ is an eighth of bfloat16's rounding error, but equals float16's.
    fast_tanh = call.query.dtype == torch.bfloat16 and current_target().startswith("sm_")
    return Gate(
        name=constant(call.gate or "none"),
        fast_tanh=constant(fast_tanh),
        alpha=_parameter(call.alpha),
        tau=_parameter(call.tau),
    )


def masks(call: Call) -> Masks:
    return Masks(_overlay(call.padding_mask), _overlay(call.attn_mask), _overlay(call.prefix_bias))


def sizes(call: Call) -> Sizes:
    (B, N, M), (Hq, Hkv) = call.counts, (call.query.shape[1], call.key.shape[1])
    before, after = call.keys_before, call.keys_after
    found = Sizes(
        B,
        N,
        M,
        Hq,
        Hq // Hkv,
        before=before,
        after=constant(0) if after == 0 else after,
    )
    if call.cu_seqlens_query is None or call.key_offsets is None:
        return found
    return found._replace(
        query_offsets=call.cu_seqlens_query.contiguous(),
        key_offsets=call.key_offsets.contiguous(),
        queries=call.query.shape[2],
        keys=call.key.shape[2],
    )


def scaling(call: Call) -> Scaling:
    return Scaling(call.scale, call.softcap)


def in_reach(x: Tensor) -> bool:
    *_, row, column = x.stride()
    return (column == 1 or x.shape[-1] == 1) and (row <= _LARGEST_STRIDE or x.shape[-2] == 1)


def _low_rank(pair: tuple[Tensor, Tensor] | None) -> LowRank:
    if pair is None:
        return _NO_WEIGHTS
    U, V = pair
    if not in_reach(U):
        U = U.contiguous()
    if not in_reach(V):
        V = V.contiguous()
    U_prefix, U_row, _ = (0, *U.stride())[-3:]  # 0 without a bank
    V_prefix, V_rank, V_head, _ = (0, *V.stride())[-4:]
    return LowRank(U, U_prefix, U_row, V, V_prefix, V_rank, V_head, constant(U.shape[-1]))


def _parameter(x: float | Tensor) -> Parameter:
    if not isinstance(x, Tensor):
        return Parameter(None, 0, 0, float(x))
    prefix, head = (0, 0, *_broadcast_strides(x))[-2:]  # [] and [Hq] are the same for all prefixes
    return Parameter(x, prefix, head, 0.0)


def _overlay(x: Tensor | None) -> Overlay:
    """Return a mask with four dimensions, or [sample, key], as kernels read it."""
    if x is None:
        return _NO_OVERLAY
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    strides = _broadcast_strides(x)
    sample, head, query, key = strides if len(strides) == 4 else (strides[0], 0, 0, strides[1])
    return Overlay(x, sample, head, query, key)


def _broadcast_strides(x: Tensor) -> list[int]:
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride())]


_NO_ROWS = Rows(None, 0, 0, 0, constant(1), constant(16))
_NO_WEIGHTS = LowRank(None, 0, 0, None, 0, 0, 0, constant(0))
_NO_OVERLAY = Overlay(None, 0, 0, 0, 0)
