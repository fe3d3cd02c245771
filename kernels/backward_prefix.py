"""The prefix's gradients from their parts: sums over shares and over the G query heads of a key head.

    dk' = Σ parts        dK = dk' ∘ W        dα, dτ = Σ parts

and likewise for values. Rows that are not reweighted (the first `n_shared`) have dK = dk'. A separate launch,
`backward_reweighting`, computes dU and dV from dk', so that parts are read once. One program computes each sum (a row
of dk', an entry of dα) in a fixed order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import Call, Stored
from .backward_keys import Parts
from .launch import Launch
from .tiles import length_of, weight_rows

TILE = tl.constexpr(2048)  # elements that a program adds at once


class Sums(NamedTuple):
    """The parts of keys or values, and their contiguous sums [T, Hkv, P, D]. None: not needed."""

    parts: Any  # [shares, T, Hq, P, D], float32
    rows: Any  # dK, in the dtype of the stored rows
    total: Any  # dk', float32
    stored: Stored
    end: None = None  # see arguments.py


class GateGradient(NamedTuple):
    pointer: Any  # [1 or T, 1 or Hq]
    prefixes: int
    heads: int


@triton.jit
def backward_prefix_kernel(key, value, d_alpha, d_tau, parts, prefix, sizes, n_shared):
    """The grid runs over all rows of dk', then of dv', then all entries of dα and dτ."""
    pid = tl.program_id(0)
    count = prefix.n_prefixes * (sizes.heads // sizes.group) * prefix.n_rows
    if key.parts is not None:
        if pid < count:
            row_of_sums(pid, key, parts.shares, prefix, sizes, n_shared)
        pid -= count
    if value.parts is not None:
        if (pid >= 0) & (pid < count):
            row_of_sums(pid, value, parts.shares, prefix, sizes, n_shared)
        pid -= count
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
def row_of_sums(pid, side, shares, prefix, sizes, n_shared):
    """One row of dk', and of dK = dk' ∘ W."""
    BLOCK: tl.constexpr = TILE // side.stored.rows.BLOCK_D
    heads = sizes.heads // sizes.group
    p = pid % prefix.n_rows
    hk = pid // prefix.n_rows % heads
    t = (pid // prefix.n_rows // heads).to(tl.int64)
    d = tl.arange(0, side.stored.rows.BLOCK_D)[None, :]
    total = tl.zeros([BLOCK, side.stored.rows.BLOCK_D], tl.float32)
    for start in range(0, shares * sizes.group, BLOCK):
        index = start + tl.arange(0, BLOCK)
        block = (index // sizes.group).to(tl.int64) * prefix.n_prefixes + t
        block = block * sizes.heads + hk * sizes.group + index % sizes.group
        part = side.parts + ((block * prefix.n_rows + p) * side.stored.rows.D)[:, None] + d
        total += tl.load(part, mask=(index < shares * sizes.group)[:, None] & (d < side.stored.rows.D), other=0.0)
    row = tl.sum(total, 0)[None, :]
    at = pid.to(tl.int64) * side.stored.rows.D + d
    if side.total is not None:
        tl.store(side.total + at, row, mask=d < side.stored.rows.D)
    if side.rows is not None:
        if side.stored.weights.U is not None:
            row *= weight_rows(side.stored, n_shared, t, hk, p, length_of(prefix, t), 1)
        tl.store(side.rows + at, row.to(side.rows.dtype.element_ty), mask=d < side.stored.rows.D)


@triton.jit
def gate_entry(pid, gradient, part, parts, prefix, sizes):
    """One entry of dα or dτ: the sum over shares, tiles, and the prefixes and heads that share it."""
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


def launch(
    call: Call, parts: Parts, gradients: dict[str, Tensor], total_key: Tensor | None, total_value: Tensor | None
) -> Launch:
    """Write dK, dV, dα and dτ to the gradients, and dk' and dv', `[T, Hkv, P, D]` in float32, to the totals."""
    T, Hkv, P = arguments.n_prefixes(call), call.key.shape[1], call.prefix_key.shape[-2]
    key = arguments.stored(call.prefix_key, call.reweight_key)
    value = arguments.stored(call.prefix_value, call.reweight_value)
    d_alpha, d_tau = _gate_gradient(gradients.get("gate_alpha")), _gate_gradient(gradients.get("gate_tau"))
    sides = (parts.key is not None) + (parts.value is not None)
    return Launch(
        backward_prefix_kernel,
        programs=sides * T * Hkv * P + sum(d.prefixes * d.heads for d in (d_alpha, d_tau)),
        arguments={
            "key": Sums(parts.key, gradients.get("prefix_key"), total_key, key),
            "value": Sums(parts.value, gradients.get("prefix_value"), total_value, value),
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
