"""The gradients of W = U V from dk', the sum that `backward_prefix` computes.

    dU[p, r] = Σ_hd (dk' ∘ K)[h, p, d] V[r, h, d]        dV[r, h, d] = Σ_p U[p, r] (dk' ∘ K)[h, p, d]

and likewise for values. Rows that are not reweighted (the first `n_shared`) contribute to neither. One program computes
each sum (an entry of dU, a few columns of dV) in a fixed order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import Call, Stored
from .launch import Launch
from .tiles import length_of

COLUMNS = tl.constexpr(16)  # columns of dV in a program
TILE = tl.constexpr(2048)  # elements that a program adds at once


class Reweighting(NamedTuple):
    """The reweighting of keys or values. Gradients are contiguous, in the dtypes of U and V; None: not needed."""

    stored: Stored
    total: Any  # [T, Hkv, P, D], float32: dk'
    U: Any  # [T, P, R]
    V: Any  # [T, R, Hkv, D]
    end: None = None  # see arguments.py


@triton.jit
def backward_reweighting_kernel(key, value, prefix, heads, n_shared):
    """The grid runs over the entries of dU and the columns of dV, keys first."""
    pid = one_side(tl.program_id(0), key, prefix, heads, n_shared)
    one_side(pid, value, prefix, heads, n_shared)


@triton.jit
def one_side(pid, side, prefix, heads, n_shared):
    """Run the programs of keys or values; return pid minus their number."""
    if side.U is not None:
        count = prefix.n_prefixes * prefix.n_rows * side.stored.weights.rank
        if (pid >= 0) & (pid < count):
            entry_of_U(pid, side, prefix, heads, n_shared)
        pid -= count
    if side.V is not None:
        count = prefix.n_prefixes * side.stored.weights.rank * heads * tl.cdiv(side.stored.rows.D, COLUMNS)
        if (pid >= 0) & (pid < count):
            columns_of_V(pid, side, prefix, heads, n_shared)
        pid -= count
    return pid


@triton.jit
def products(side, prefix, heads, t, h, p, d, inside):
    """(dk' ∘ K)[h, p, d] in float32, of heads and rows [BLOCK, 1] and columns [1, columns]."""
    total = side.total + ((t * heads + h) * prefix.n_rows + p).to(tl.int64) * side.stored.rows.D + d
    k = (
        side.stored.rows.pointer
        + t * side.stored.rows.outer
        + h.to(tl.int64) * side.stored.rows.head
        + p.to(tl.int64) * side.stored.rows.row
        + d
    )
    return tl.load(total, mask=inside, other=0.0) * tl.load(k, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def entry_of_U(pid, side, prefix, heads, n_shared):
    """One entry of dU: the sum over heads and columns."""
    weights = side.stored.weights
    BLOCK: tl.constexpr = TILE // side.stored.rows.BLOCK_D
    r = pid % weights.rank
    p = pid // weights.rank % prefix.n_rows
    t = (pid // weights.rank // prefix.n_rows).to(tl.int64)
    d = tl.arange(0, side.stored.rows.BLOCK_D)[None, :]
    total = tl.zeros([BLOCK, side.stored.rows.BLOCK_D], tl.float32)
    reweighted = (p >= n_shared) & (p < length_of(prefix, t))
    count = tl.where(reweighted, heads, 0)
    for start in range(0, count, BLOCK):
        h = start + tl.arange(0, BLOCK)[:, None]
        inside = (h < count) & (d < side.stored.rows.D)
        v = weights.V + t * weights.V_prefix + r * weights.V_rank + h.to(tl.int64) * weights.V_head + d
        kv = products(side, prefix, heads, t, h, p, d, inside)
        total += kv * tl.load(v, mask=inside, other=0.0).to(tl.float32)
    tl.store(side.U + pid, tl.sum(tl.sum(total, 1), 0).to(side.U.dtype.element_ty))


@triton.jit
def columns_of_V(pid, side, prefix, heads, n_shared):
    """COLUMNS columns of one row of dV: the sum over the reweighted rows."""
    weights = side.stored.weights
    BLOCK: tl.constexpr = TILE // COLUMNS
    tiles = tl.cdiv(side.stored.rows.D, COLUMNS)
    d = (pid % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    h = pid // tiles % heads
    r = pid // tiles // heads % weights.rank
    t = (pid // tiles // heads // weights.rank).to(tl.int64)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    end = length_of(prefix, t)
    for start in range(n_shared, end, BLOCK):
        p = start + tl.arange(0, BLOCK)[:, None]
        u = weights.U + t * weights.U_prefix + p.to(tl.int64) * weights.U_row + r
        ku = products(side, prefix, heads, t, h, p, d, (p < end) & (d < side.stored.rows.D))
        total += ku * tl.load(u, mask=p < end, other=0.0).to(tl.float32)
    V = side.V + ((t * weights.rank + r) * heads + h) * side.stored.rows.D + d
    tl.store(V, tl.sum(total, 0)[None, :].to(side.V.dtype.element_ty), mask=d < side.stored.rows.D)


def launch(call: Call, gradients: dict[str, Tensor], total_key: Tensor | None, total_value: Tensor | None) -> Launch:
    """Write dU and dV to the gradients; a side without a total needs none."""
    key = _side(call.prefix_key, call.reweight_key, total_key, gradients.get("U_key"), gradients.get("V_key"))
    value = _side(
        call.prefix_value, call.reweight_value, total_value, gradients.get("U_value"), gradients.get("V_value")
    )
    programs = 0
    for side in (key, value):
        programs += side.U.numel() if side.U is not None else 0
        if side.V is not None:
            D = side.V.shape[-1]
            programs += side.V.numel() // D * arguments.cdiv(D, COLUMNS.value)
    return Launch(
        backward_reweighting_kernel,
        programs,
        arguments={
            "key": key,
            "value": value,
            "prefix": arguments.prefix(call),
            "heads": call.key.shape[1],
            "n_shared": call.n_shared,
        },
        options={"num_warps": 4, "num_stages": 1},
    )


def _side(
    stored: Tensor, weights: tuple[Tensor, Tensor] | None, total: Tensor | None, U: Tensor | None, V: Tensor | None
) -> Reweighting:
    return Reweighting(arguments.stored(stored, weights), total, U, V)
