"""The second kernel of the backward pass: dk and dv of the context, and the prefix's gradients in parts.

A program has one tile of keys and loops over queries. Its scores are transposed, [keys, queries], so that no operand of
a product is transposed in registers:

    dv = Σ p dO        dk = c Σ p (dO vᵀ - δ) g'(s) q        (g' = 1 in the context)
    dα = Σ p (dO vᵀ - δ) ∂g/∂α        dτ = Σ p (dO vᵀ - δ) ∂g/∂τ

where g is that of the capped score, and the cap's derivative also enters dk.

A tile of context keys belongs to one sample and loops over the queries of its G heads. A tile of prefix rows belongs to
every sample that uses the prefix. So the query tiles of the batch are split into shares, one for each program, and
`backward_prefix` adds the shares' sums in a fixed order. With a bank, a program searches its share for the samples that
use its prefix. No sum depends on the order in which programs run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import Call, PerQuery
from .gate import gated_with_derivatives
from .launch import Launch, variant_for
from .scaling import scaled
from .tiles import (
    LOG2E,
    context_scores,
    gate_parameter,
    length_of,
    load_lse,
    load_rows,
    prefix_of,
    prefix_scores,
    query_rows,
    softmax_weights,
    span_of,
    store_rows,
    unmasked_scores,
    within_reach,
)

PROGRAMS = 264  # for the prefix, if there are enough query tiles: two on each of 132 multiprocessors


class Parts(NamedTuple):
    """The prefix's gradients in float32 before the shares are summed. None: not needed."""

    key: Any  # [shares, T, Hq, P, D]: c Σ ds q
    value: Any  # [shares, T, Hq, P, Dv]: Σ p dO
    alpha: Any  # [shares, T, Hq, tiles of P]
    tau: Any
    shares: int
    tiles: int

    @property
    def needed(self) -> bool:
        return not (self.key is self.value is self.alpha is None)


@triton.jit
def backward_keys_kernel(
    query, key, value, prefix, gate, masks, output, d_output, per_query, d_key, d_value, parts, sizes, scaling, variant,
    prefix_programs,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < prefix_programs:
        if parts.key is not None or parts.value is not None or parts.alpha is not None:
            prefix_tile(pid, query, prefix, gate, masks, output, d_output, per_query, parts, sizes, scaling, variant)
    else:
        if d_key.pointer is not None or d_value.pointer is not None:
            context_tile(
                pid - prefix_programs, query, key, value, masks, output, d_output, per_query, d_key, d_value, sizes,
                scaling, variant,
            )  # fmt: skip


@triton.jit
def context_tile(pid, query, key, value, masks, output, d_output, per_query, d_key, d_value, sizes, scaling, variant):
    tiles = tl.cdiv(sizes.M, variant.BLOCK_M)
    heads = sizes.heads // sizes.group
    hk = pid // tiles % heads
    b = pid // tiles // heads
    span = span_of(sizes, b)
    m = pid % tiles * variant.BLOCK_M
    k = load_rows(key, span.keys, hk, m, span.M, variant.BLOCK_M)
    v = load_rows(value, span.keys, hk, m, span.M, variant.BLOCK_M)
    dk = tl.zeros([variant.BLOCK_M, key.BLOCK_D], tl.float32)
    dv = tl.zeros([variant.BLOCK_M, value.BLOCK_D], tl.float32)

    # One loop runs through the query tiles of all G heads, those that see all its keys and those that causality cuts: a
    # loop within a loop, or a second one for these, costs the registers of both.
    first, end = query_range(sizes, span, m, variant)
    h = tl.cast(hk, tl.int32) * sizes.group
    tile = tl.cast(first, tl.int32) + 0
    for _ in range(0, (end - first) * sizes.group):
        n = tile * variant.BLOCK_N
        q, d_o, L, rest, d = load_queries(query, output, d_output, per_query, sizes, span, h, n, variant)
        i = tl.arange(0, variant.BLOCK_N)[None, :]
        j = tl.arange(0, variant.BLOCK_M)[:, None]
        s = tl.dot(k, tl.trans(q), input_precision=variant.PRECISION)
        if variant.HAS_MASK:
            s, cap_slope = scaled(s, scaling)
            s = context_scores(s, masks, sizes, span, b, h, n, i, m, j)
            w = softmax_weights(s, LOG2E, L, rest, variant)
        else:
            s, unit, cap_slope = unmasked_scores(s, scaling, variant)
            w = softmax_weights(s, unit, L, rest, variant)
            if sizes.before is not None or sizes.after is not None:
                w = tl.where(within_reach(sizes, span, n, i, m, j), w, 0.0)
        dk, dv = add_context(dk, dv, w, cap_slope, q, d_o, d, v, d_key, d_value, variant)
        h, tile = next_tile(h, tile, first, end)

    if d_key.pointer is not None:
        store_rows(d_key, span.keys, hk, m, span.M, dk * scaling.factor, variant.BLOCK_M)
    if d_value.pointer is not None:
        store_rows(d_value, span.keys, hk, m, span.M, dv, variant.BLOCK_M)


@triton.jit
def next_tile(h, tile, first, end):
    """The next of a head's query tiles first..end, or the first tile of the next head."""
    last = tile + 1 == end
    return tl.where(last, h + 1, h), tl.where(last, first, tile + 1)


@triton.jit
def query_range(sizes, span, m, variant):
    """A sample's query tiles first..end see some of the keys m..m+BLOCK_M.

    Keys beyond M need no mask: their rows of dk and dv are not stored.
    """
    end = tl.cdiv(span.N, variant.BLOCK_N)
    first = 0
    if sizes.query_offsets is not None:
        end = tl.where(m < span.M, end, 0)
    if sizes.before is not None:
        beyond = m + variant.BLOCK_M - (span.M - span.N) + sizes.before  # the first query that sees none of them
        end = tl.minimum(end, tl.cdiv(tl.maximum(beyond, 0), variant.BLOCK_N))
    if sizes.after is not None:
        first = tl.minimum(tl.maximum(m - (span.M - span.N) - sizes.after, 0) // variant.BLOCK_N, end)
    return first, end


@triton.jit
def first_query(tile, variant):
    return tl.cast(tile, tl.int32) * variant.BLOCK_N  # in the interpreter a loop counter is not a tensor


@triton.jit
def load_queries(query, output, d_output, per_query, sizes, span, h, n, variant):
    """q, dO and, as rows [1, BLOCK_N], the log-sum-exp with its rest and δ of one tile of queries."""
    q = load_rows(query, span.queries, h, n, span.N, variant.BLOCK_N)
    d_o = load_rows(d_output, span.queries, h, n, span.N, variant.BLOCK_N)
    start, row, exists = query_rows(sizes, span, h, n, variant)
    L, rest = load_lse(per_query, start, row, exists, variant)
    d = load_delta(output, d_output, per_query, sizes, span, h, n, variant)
    return q, d_o, L[None, :], rest[None, :], d[None, :]


@triton.jit
def load_delta(output, d_output, per_query, sizes, span, h, n, variant):
    """δ of one tile of queries, [BLOCK_N]; if no kernel has written it, from the output."""
    if per_query.delta is None:
        d_o = load_rows(d_output, span.queries, h, n, span.N, variant.BLOCK_N)
        o = load_rows(output, span.queries, h, n, span.N, variant.BLOCK_N)
        return tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1)
    else:
        start, row, exists = query_rows(sizes, span, h, n, variant)
        return tl.load(per_query.delta + start + row, mask=exists, other=0.0)


@triton.jit
def add_context(dk, dv, w, cap_slope, q, d_o, d, v, d_key, d_value, variant):
    """Add a tile of queries with weights w [keys, queries] to dk and dv."""
    if d_value.pointer is not None:
        dv = tl.dot(w.to(d_o.dtype), d_o, dv, input_precision=variant.PRECISION)
    if d_key.pointer is not None:
        w *= cap_slope
        ds = w * (tl.dot(v, tl.trans(d_o), input_precision=variant.PRECISION) - d)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=variant.PRECISION)
    return dk, dv


@triton.jit
def prefix_tile(pid, query, prefix, gate, masks, output, d_output, per_query, parts, sizes, scaling, variant):
    p = pid % parts.tiles * variant.BLOCK_P
    block = pid // parts.tiles  # of [shares, T, Hq]
    h = block % sizes.heads
    t = (block // sizes.heads % prefix.n_prefixes).to(tl.int64)
    share = (block // sizes.heads // prefix.n_prefixes).to(tl.int64)
    hk = h // sizes.group

    length = length_of(prefix, t)
    k = load_rows(prefix.key, t, hk, p, length, variant.BLOCK_P)
    v = load_rows(prefix.value, t, hk, p, length, variant.BLOCK_P)
    alpha = gate_parameter(gate.alpha, t, h)
    tau = gate_parameter(gate.tau, t, h)
    dk = tl.zeros([variant.BLOCK_P, query.BLOCK_D], tl.float32)
    dv = tl.zeros([variant.BLOCK_P, d_output.BLOCK_D], tl.float32)
    d_alpha = tl.zeros([variant.BLOCK_P], tl.float32)
    d_tau = tl.zeros([variant.BLOCK_P], tl.float32)

    # The share: tiles first..last of all samples' query tiles, counted through.
    tiles = tl.maximum(tl.cdiv(sizes.N, variant.BLOCK_N), 1)
    first = (share * tiles * sizes.B // parts.shares).to(tl.int32)
    last = ((share + 1) * tiles * sizes.B // parts.shares).to(tl.int32)
    if prefix.index is None and sizes.query_offsets is None:
        for step in range(first, last):
            b = step // tiles
            span = span_of(sizes, b)
            dk, dv, d_alpha, d_tau = add_prefix(
                dk, dv, d_alpha, d_tau, k, v, alpha, tau, length, b, h, first_query(step % tiles, variant), p,
                query, gate, masks, output, d_output, per_query, parts, sizes, span, scaling, variant,
            )  # fmt: skip
    else:
        for b in range(first // tiles, tl.cdiv(last, tiles)):
            span = span_of(sizes, b)
            used, _ = prefix_of(prefix, b)
            end = tl.where(used == t, tl.minimum(last - b * tiles, tiles), 0)
            if sizes.query_offsets is not None:
                end = tl.minimum(end, tl.cdiv(span.N, variant.BLOCK_N))
            for tile in range(tl.maximum(first - b * tiles, 0), end):
                dk, dv, d_alpha, d_tau = add_prefix(
                    dk, dv, d_alpha, d_tau, k, v, alpha, tau, length, b, h, first_query(tile, variant), p,
                    query, gate, masks, output, d_output, per_query, parts, sizes, span, scaling, variant,
                )  # fmt: skip

    if parts.key is not None:
        store_part(parts.key, block, p, prefix.n_rows, dk * scaling.factor, query.D)
    if parts.value is not None:
        store_part(parts.value, block, p, prefix.n_rows, dv, d_output.D)
    if parts.alpha is not None:
        tl.store(parts.alpha + pid, tl.sum(d_alpha, 0))
        tl.store(parts.tau + pid, tl.sum(d_tau, 0))


@triton.jit
def add_prefix(
    dk, dv, d_alpha, d_tau, k, v, alpha, tau, length, b, h, n, p,
    query, gate, masks, output, d_output, per_query, parts, sizes, span, scaling, variant,
):  # fmt: skip
    """Add a tile of queries to the sums."""
    q, d_o, L, rest, d = load_queries(query, output, d_output, per_query, sizes, span, h, n, variant)
    i = tl.arange(0, variant.BLOCK_N)[None, :]
    j = tl.arange(0, variant.BLOCK_P)[:, None]
    s, cap_slope = scaled(tl.dot(k, tl.trans(q), input_precision=variant.PRECISION), scaling)
    g, slope, by_alpha, by_tau = gated_with_derivatives(s, alpha, tau, gate.name, gate.fast_tanh)
    slope *= cap_slope
    g = prefix_scores(g, masks, span.N, length, b, h, n, i, p, j)
    w = softmax_weights(g, LOG2E, L, rest, variant)
    if parts.value is not None:
        dv = tl.dot(w.to(d_o.dtype), d_o, dv, input_precision=variant.PRECISION)
    if parts.key is not None or parts.alpha is not None:
        dg = w * (tl.dot(v, tl.trans(d_o), input_precision=variant.PRECISION) - d)
        if parts.alpha is not None:
            d_alpha += tl.sum(dg * by_alpha, 1)
            d_tau += tl.sum(dg * by_tau, 1)
        if parts.key is not None:
            dk = tl.dot((dg * slope).to(q.dtype), q, dk, input_precision=variant.PRECISION)
    return dk, dv, d_alpha, d_tau


@triton.jit
def store_part(part, block, p, n_rows, x, D: tl.constexpr):
    """Rows p.. of the block-th [P, D] of a part."""
    rows = p + tl.arange(0, x.shape[0])
    d = tl.arange(0, x.shape[1])
    inside = (rows < n_rows)[:, None] & (d < D)[None, :]
    tl.store(part + block.to(tl.int64) * n_rows * D + (rows[:, None] * D + d[None, :]), x, mask=inside)


def empty_parts(call: Call, direction: str, *, key: bool, value: bool, gate: bool) -> Parts:
    """Allocate the needed parts for a launch in a direction of the table of blocks."""
    (B, N, _), (Hq, D) = call.counts, call.query.shape[1::2]
    T, P, DV = arguments.n_prefixes(call), call.prefix_key.shape[-2], call.value.shape[-1]
    variant, _ = variant_for(call, direction)
    tiles = arguments.cdiv(P, variant.BLOCK_P)
    query_tiles = B * arguments.cdiv(N, variant.BLOCK_N)
    in_use = max(min(T, B) * Hq * tiles, 1)  # programs for each share; those of unused prefixes are idle
    shares = max(1, min(query_tiles, arguments.cdiv(PROGRAMS, in_use)))

    def part(*shape: int) -> Tensor:
        return arguments.scratch(call.query, (shares, T, Hq, *shape), torch.float32)

    return Parts(
        key=part(P, D) if key else None,
        value=part(P, DV) if value else None,
        alpha=part(tiles) if gate else None,
        tau=part(tiles) if gate else None,
        shares=shares,
        tiles=tiles,
    )


def launch(
    call: Call,
    shared: dict[str, Any],
    d_output: Tensor,
    per_query: PerQuery,
    d_key: Tensor | None,
    d_value: Tensor | None,
    parts: Parts,
) -> Launch:
    variant, options = variant_for(call, "keys")
    (B, _, M), Hkv = call.counts, call.key.shape[1]
    prefix_programs = context_programs = 0
    if parts.needed:
        prefix_programs = parts.shares * parts.tiles * arguments.n_prefixes(call) * call.query.shape[1]
    if d_key is not None or d_value is not None:
        context_programs = B * Hkv * arguments.cdiv(M, variant.BLOCK_M)
    return Launch(
        backward_keys_kernel,
        programs=prefix_programs + context_programs,
        arguments={
            **shared,
            "output": arguments.written_rows(None),
            "d_output": arguments.rows(d_output),
            "per_query": per_query,
            "d_key": arguments.written_rows(d_key),
            "d_value": arguments.written_rows(d_value),
            "parts": parts,
            "variant": variant.marked(),
            "prefix_programs": prefix_programs,
        },
        options=options,
    )
