"""The prefix as attention sees it, k' = W_K ∘ K and v' = W_V ∘ V, computed once a call, in query's dtype.

    W[p, d] = Σ_r U[p, r] V[r, d] for previous rows, 1 for the first n_shared

Products are computed in float32 and rounded once. A program has a few rows of one head, keys or values. It skips rows
beyond a prefix's length and, with a bank, prefixes that no sample uses, because nothing reads them. The other kernels
then loop over the prefix as over the context, through rows of one dtype that can be prefetched.
"""

from dataclasses import replace
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import Call, Rows, Stored
from .launch import Launch
from .tiles import length_of, load_rows, store_rows, weight_rows, within_bank

ROWS = tl.constexpr(16)  # rows of a program
SAMPLES = tl.constexpr(1024)  # samples whose prefixes it examines at once


class Side(NamedTuple):
    """Source and destination of keys or values. If the pointer of `folded` is None, stored rows need no folding."""

    stored: Stored
    folded: Rows
    end: None = None  # see arguments.py


@triton.jit
def fold_kernel(key, value, prefix, B, heads, n_shared):
    """The grid runs over the tiles of all heads and prefixes, keys first."""
    tiles = tl.cdiv(prefix.n_rows, ROWS)
    pid = tl.program_id(0)
    if key.folded.pointer is not None:
        count = prefix.n_prefixes * heads * tiles
        if pid < count:
            fold_rows(pid, key, prefix, B, heads, n_shared, tiles)
        pid -= count
    if value.folded.pointer is not None:  # noqa: SIM102 (known when it is compiled; the other one is not)
        if pid >= 0:
            fold_rows(pid, value, prefix, B, heads, n_shared, tiles)


@triton.jit
def fold_rows(pid, side, prefix, B, heads, n_shared, tiles):
    p = pid % tiles * ROWS
    h = pid // tiles % heads
    t = (pid // tiles // heads).to(tl.int64)
    end = length_of(prefix, t)
    if prefix.index is not None:
        end = tl.where(is_used(prefix, t, B), end, 0)
    if p < end:
        x = load_rows(side.stored.rows, t, h, p, end, ROWS).to(tl.float32)
        if side.stored.weights.U is not None:
            x *= weight_rows(side.stored, n_shared, t, h, p, end, ROWS)
        store_rows(side.folded, t, h, p, end, x, ROWS)


@triton.jit
def is_used(prefix, t, B):
    """Whether some sample uses prefix t."""
    found = tl.zeros([SAMPLES], tl.int32)
    for start in range(0, B, SAMPLES):
        b = start + tl.arange(0, SAMPLES)
        used = within_bank(prefix, tl.load(prefix.index + b, mask=b < B, other=0).to(tl.int64))
        found |= ((used == t) & (b < B)).to(tl.int32)
    return tl.max(found, 0) > 0


def folded(call: Call) -> tuple[Call, list[Launch]]:
    """Return the call with prefix k' and v' and no reweighting, and the launch, if any, that computes them."""
    key = _room(call, call.prefix_key, call.reweight_key)
    value = _room(call, call.prefix_value, call.reweight_value)
    if key is value is None:
        return call, []
    T, Hkv, P = arguments.n_prefixes(call), call.key.shape[1], call.prefix_key.shape[-2]
    sides = (key is not None) + (value is not None)
    launch = Launch(
        fold_kernel,
        programs=sides * T * Hkv * arguments.cdiv(P, ROWS.value),
        arguments={
            "key": Side(arguments.stored(call.prefix_key, call.reweight_key), arguments.written_rows(key)),
            "value": Side(arguments.stored(call.prefix_value, call.reweight_value), arguments.written_rows(value)),
            "prefix": arguments.prefix(call),
            "B": call.counts[0],
            "heads": Hkv,
            "n_shared": call.n_shared,
        },
        options={"num_warps": 4, "num_stages": 1},
    )
    after = replace(
        call,
        prefix_key=call.prefix_key if key is None else key,
        prefix_value=call.prefix_value if value is None else value,
        U_key=None,
        V_key=None,
        U_value=None,
        V_value=None,
    )
    return after, [launch]


def _room(call: Call, stored: Tensor, weights: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Allocate folded rows; None if the stored rows need no folding."""
    if weights is None and stored.dtype == call.query.dtype:
        return None
    return arguments.scratch(call.query, stored.shape, call.query.dtype)
