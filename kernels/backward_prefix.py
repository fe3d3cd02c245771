"""The third kernel of the backward pass: adds up the prefix's gradients and takes them through W = U Vᵀ.

With dk' the sum of all shares and of the G query heads of a key head (`backward_keys.Parts`):

    dK = dk' ∘ W      dU[p, r] = Σ_hd (dk' ∘ K)[h, p, d] V[r, h, d]      dV[r, h, d] = Σ_p U[p, r] (dk' ∘ K)[h, p, d]

and the same for values. Rows that are not reweighted (the first `n_shared`) have dK = dk' and no part in dU and dV.
Each number is the sum of one program, in a fixed order: a row of dK, an entry of dU, a few columns of dV, an entry
of dα.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .backward_keys import Parts
from .launch import Launch
from .tiles import length_of, weight_rows

COLUMNS = tl.constexpr(16)  # of dV a program
TILE = tl.constexpr(4096)  # numbers that a program adds at once


class Gradients(NamedTuple):
    """Where the sums go: contiguous, in the dtypes of what they are gradients of. None: not needed."""

    rows: Any  # [T, Hkv, P, D]
    U: Any  # [T, P, R]
    V: Any  # [T, R, Hkv, D]


class GateGradient(NamedTuple):
    pointer: Any  # [1 or T, 1 or Hq]
    prefixes: int
    heads: int


@triton.jit
def backward_prefix_kernel(key, value, d_key, d_value, d_alpha, d_tau, parts, prefix, sizes, n_shared):
    """The grid counts through all rows of dK, all entries of dU, ...: each program finds its place in turn."""
    pid = tl.program_id(0)
    pid = one_side(pid, d_key, key, parts.key, parts.shares, prefix, sizes, n_shared)
    pid = one_side(pid, d_value, value, parts.value, parts.shares, prefix, sizes, n_shared)
    if d_alpha.pointer is not None:
        count = d_alpha.prefixes * d_alpha.heads
        if (pid >= 0) & (pid < count):
            gate_entry(pid, d_alpha, parts.alpha, parts, prefix, sizes)
        pid -= count
    if d_tau.pointer is not None:
        count = d_tau.prefixes * d_tau.heads
        if (pid >= 0) & (pid < count):
            gate_entry(pid, d_tau, parts.tau, parts, prefix, sizes)


@triton.jit
def one_side(pid, gradients, stored, part, shares, prefix, sizes, n_shared):
    """The programs of the keys or of the values; returns pid counted from behind them."""
    heads = sizes.heads // sizes.group
    if gradients.rows is not None:
        count = prefix.n_prefixes * heads * prefix.n_rows
        if (pid >= 0) & (pid < count):
            row_of_rows(pid, gradients, stored, part, shares, prefix, sizes, n_shared)
        pid -= count
    if gradients.U is not None:
        count = prefix.n_prefixes * prefix.n_rows * stored.weights.rank
        if (pid >= 0) & (pid < count):
            entry_of_U(pid, gradients, stored, part, shares, prefix, sizes, n_shared)
        pid -= count
    if gradients.V is not None:
        count = prefix.n_prefixes * stored.weights.rank * heads * tl.cdiv(stored.rows.D, COLUMNS)
        if (pid >= 0) & (pid < count):
            columns_of_V(pid, gradients, stored, part, shares, prefix, sizes, n_shared)
        pid -= count
    return pid


@triton.jit
def part_rows(part, share, t, h, p, d, prefix, sizes, D: tl.constexpr):
    """Pointers to row p of head h in each share, for d [1, columns]."""
    block = (share.to(tl.int64) * prefix.n_prefixes + t) * sizes.heads + h
    return part + ((block * prefix.n_rows + p) * D)[:, None] + d


@triton.jit
def row_of_rows(pid, gradients, stored, part, shares, prefix, sizes, n_shared):
    """One row of dK: the sum over shares and the G heads, times W."""
    BLOCK: tl.constexpr = TILE // stored.rows.BLOCK_D
    heads = sizes.heads // sizes.group
    p = pid % prefix.n_rows
    hk = pid // prefix.n_rows % heads
    t = (pid // prefix.n_rows // heads).to(tl.int64)
    d = tl.arange(0, stored.rows.BLOCK_D)[None, :]
    total = tl.zeros([BLOCK, stored.rows.BLOCK_D], tl.float32)
    for start in range(0, shares * sizes.group, BLOCK):
        index = start + tl.arange(0, BLOCK)
        h = hk * sizes.group + index % sizes.group
        inside = (index < shares * sizes.group)[:, None] & (d < stored.rows.D)
        x = part_rows(part, index // sizes.group, t, h, p, d, prefix, sizes, stored.rows.D)
        total += tl.load(x, mask=inside, other=0.0)
    row = tl.sum(total, 0)[None, :]
    if stored.weights.U is not None:
        row *= weight_rows(stored, n_shared, t, hk, p, length_of(prefix, t), 1)
    row = row.to(gradients.rows.dtype.element_ty)
    tl.store(gradients.rows + pid.to(tl.int64) * stored.rows.D + d, row, mask=d < stored.rows.D)


@triton.jit
def entry_of_U(pid, gradients, stored, part, shares, prefix, sizes, n_shared):
    """One entry of dU: the sum over shares, heads and columns."""
    BLOCK: tl.constexpr = TILE // stored.rows.BLOCK_D
    weights = stored.weights
    r = pid % weights.rank
    p = pid // weights.rank % prefix.n_rows
    t = (pid // weights.rank // prefix.n_rows).to(tl.int64)
    d = tl.arange(0, stored.rows.BLOCK_D)[None, :]
    total = tl.zeros([BLOCK, stored.rows.BLOCK_D], tl.float32)
    reweighted = (p >= n_shared) & (p < length_of(prefix, t))
    count = tl.where(reweighted, shares * sizes.heads, 0)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        h = index % sizes.heads
        hk = (h // sizes.group).to(tl.int64)[:, None]
        inside = (index < count)[:, None] & (d < stored.rows.D)
        x = part_rows(part, index // sizes.heads, t, h, p, d, prefix, sizes, stored.rows.D)
        k = stored.rows.pointer + t * stored.rows.outer + hk * stored.rows.head + p.to(tl.int64) * stored.rows.row + d
        v = weights.V + t * weights.V_prefix + r * weights.V_rank + hk * weights.V_head + d
        kv = tl.load(k, mask=inside, other=0.0).to(tl.float32) * tl.load(v, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(x, mask=inside, other=0.0) * kv
    tl.store(gradients.U + pid, tl.sum(tl.sum(total, 1), 0).to(gradients.U.dtype.element_ty))


@triton.jit
def columns_of_V(pid, gradients, stored, part, shares, prefix, sizes, n_shared):
    """COLUMNS columns of one row of dV: the sum over shares, the G heads and the reweighted rows."""
    BLOCK: tl.constexpr = TILE // COLUMNS
    weights = stored.weights
    heads = sizes.heads // sizes.group
    tiles = tl.cdiv(stored.rows.D, COLUMNS)
    d = (pid % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    hk = pid // tiles % heads
    r = pid // tiles // heads % weights.rank
    t = (pid // tiles // heads // weights.rank).to(tl.int64)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    per_row = shares * sizes.group
    count = tl.maximum(length_of(prefix, t) - n_shared, 0) * per_row
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        p = n_shared + index // per_row
        h = hk * sizes.group + index % sizes.group
        inside = (index < count)[:, None] & (d < stored.rows.D)
        x = part_rows(part, index % per_row // sizes.group, t, h, p, d, prefix, sizes, stored.rows.D)
        k = stored.rows.pointer + t * stored.rows.outer + tl.cast(hk, tl.int64) * stored.rows.head
        k = k + (p.to(tl.int64) * stored.rows.row)[:, None] + d
        u = weights.U + t * weights.U_prefix + p.to(tl.int64) * weights.U_row + r
        ku = tl.load(k, mask=inside, other=0.0).to(tl.float32)
        ku *= tl.load(u, mask=index < count, other=0.0).to(tl.float32)[:, None]
        total += tl.load(x, mask=inside, other=0.0) * ku
    V = gradients.V + ((t * weights.rank + r) * heads + hk) * stored.rows.D + d
    tl.store(V, tl.sum(total, 0)[None, :].to(gradients.V.dtype.element_ty), mask=d < stored.rows.D)


@triton.jit
def gate_entry(pid, gradient, part, parts, prefix, sizes):
    """One entry of dα or dτ: the sum over shares, tiles, and all prefixes and heads that have it in common."""
    total = tl.zeros([TILE], tl.float32)
    count = parts.shares * prefix.n_prefixes * sizes.heads * parts.tiles
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        block = index // parts.tiles
        mine = index < count
        if gradient.prefixes > 1:
            mine = mine & (block // sizes.heads % prefix.n_prefixes == pid // gradient.heads)
        if gradient.heads > 1:
            mine = mine & (block % sizes.heads == pid % gradient.heads)
        total += tl.load(part + index, mask=mine, other=0.0)
    tl.store(gradient.pointer + pid, tl.sum(total, 0).to(gradient.pointer.dtype.element_ty))


def launch(call: Any, parts: Parts, gradients: dict[str, Tensor]) -> Launch:
    T, Hkv, P = arguments.n_prefixes(call), call.key.shape[1], call.prefix_key.shape[-2]
    d_key = Gradients(gradients.get("prefix_key"), gradients.get("U_key"), gradients.get("V_key"))
    d_value = Gradients(gradients.get("prefix_value"), gradients.get("U_value"), gradients.get("V_value"))
    d_alpha, d_tau = _gate_gradient(gradients.get("gate_alpha")), _gate_gradient(gradients.get("gate_tau"))

    programs = 0
    for d_side in (d_key, d_value):
        programs += T * Hkv * P if d_side.rows is not None else 0
        programs += d_side.U.numel() if d_side.U is not None else 0
        if d_side.V is not None:
            D = d_side.V.shape[-1]
            programs += d_side.V.numel() // D * arguments.cdiv(D, COLUMNS.value)
    programs += sum(d.prefixes * d.heads for d in (d_alpha, d_tau))
    return Launch(
        backward_prefix_kernel,
        programs=programs,
        arguments={
            "key": arguments.stored(call.prefix_key, call.reweight_key),
            "value": arguments.stored(call.prefix_value, call.reweight_value),
            "d_key": d_key,
            "d_value": d_value,
            "d_alpha": d_alpha,
            "d_tau": d_tau,
            "parts": parts,
            "prefix": arguments.prefix(call),
            "sizes": arguments.sizes(call),
            "n_shared": call.n_shared,
        },
        options={"num_warps": 4, "num_stages": 1},
    )


def _gate_gradient(gradient: Tensor | None) -> GateGradient:
    if gradient is None:
        return GateGradient(None, 0, 0)
    prefixes, heads = (1,) * (2 - gradient.ndim) + gradient.shape
    return GateGradient(gradient, prefixes, heads)
