"""The first kernel of the backward pass: δ, and the gradient of the queries.

A program has one tile of queries of one head, as in the forward pass, and rebuilds the weights from the log-sum-exp L:

    δ = rowsum(dO ∘ O)                p = exp(s - L)                 over prefix (gated scores) and context
    dq = c Σ_j [p (dO vᵀ - δ)] k      over the context               dq += c Σ_j [p (dO v'ᵀ - δ) g'(s)] k'      prefix

A cap's derivative multiplies what is in brackets.

The other kernels read δ, so this kernel also runs if query needs no gradient.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import Call, PerQuery
from .gate import gated_with_derivatives
from .launch import Launch, over_queries
from .scaling import scaled
from .tiles import (
    LOG2E,
    context_range,
    context_scores,
    gate_parameter,
    load_lse,
    load_rows,
    prefix_of,
    prefix_scores,
    query_rows,
    query_tile,
    softmax_weights,
    span_of,
    store_rows,
    unmasked_scores,
)


@triton.jit
def backward_queries_kernel(
    query, key, value, prefix, gate, masks, output, d_output, per_query, d_query, sizes, scaling, variant
):
    b, h, n = query_tile(sizes, variant)
    span = span_of(sizes, b)
    if sizes.query_offsets is not None:  # noqa: SIM102 (known when it is compiled; the other one is not)
        if n >= span.N:
            return
    start, row, exists = query_rows(sizes, span, h, n, variant)
    d_o = load_rows(d_output, span.queries, h, n, span.N, variant.BLOCK_N)
    o = load_rows(output, span.queries, h, n, span.N, variant.BLOCK_N)
    d = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(per_query.delta + start + row, d, mask=exists)

    if d_query.pointer is not None:
        hk = h // sizes.group
        i = tl.arange(0, variant.BLOCK_N)[:, None]
        q = load_rows(query, span.queries, h, n, span.N, variant.BLOCK_N)
        L, rest = load_lse(per_query, start, row, exists, variant)
        dq = tl.zeros([variant.BLOCK_N, query.BLOCK_D], tl.float32)

        t, length = prefix_of(prefix, b)
        alpha = gate_parameter(gate.alpha, t, h)
        tau = gate_parameter(gate.tau, t, h)
        for p in range(0, length, variant.BLOCK_P):
            k = load_rows(prefix.key, t, hk, p, length, variant.BLOCK_P)
            s, cap_slope = scaled(tl.dot(q, tl.trans(k), input_precision=variant.PRECISION), scaling)
            g, slope, _, _ = gated_with_derivatives(s, alpha, tau, gate.name, gate.fast_tanh)
            g = prefix_scores(g, masks, span.N, length, b, h, n, i, p, tl.arange(0, variant.BLOCK_P)[None, :])
            v = load_rows(prefix.value, t, hk, p, length, variant.BLOCK_P)
            ds = score_gradient(d_o, v, d, g, LOG2E, slope * cap_slope, L, rest, variant)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=variant.PRECISION)

        begin, first, whole, end = context_range(sizes, span, n, variant)
        if sizes.before is not None:
            dq = masked_context(
                dq,
                q,
                d_o,
                d,
                L,
                rest,
                key,
                value,
                b,
                h,
                hk,
                n,
                i,
                begin,
                first,
                end,
                masks,
                sizes,
                span,
                scaling,
                variant,
            )
        if not variant.HAS_MASK:
            for j in range(first, whole, variant.BLOCK_M):
                k = load_rows(key, span.keys, hk, j, whole, variant.BLOCK_M)
                s = tl.dot(q, tl.trans(k), input_precision=variant.PRECISION)
                s, unit, cap_slope = unmasked_scores(s, scaling, variant)
                v = load_rows(value, span.keys, hk, j, whole, variant.BLOCK_M)
                ds = score_gradient(d_o, v, d, s, unit, cap_slope, L, rest, variant)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=variant.PRECISION)
        dq = masked_context(
            dq, q, d_o, d, L, rest, key, value, b, h, hk, n, i, whole, end, end, masks, sizes, span, scaling, variant
        )

        store_rows(d_query, span.queries, h, n, span.N, dq * scaling.factor, variant.BLOCK_N)


@triton.jit
def masked_context(
    dq, q, d_o, d, L, rest, key, value, b, h, hk, n, i, start, stop, end, masks, sizes, span, scaling, variant
):
    """Add the context tiles start..stop, which some queries do not see entirely."""
    for j in range(start, stop, variant.BLOCK_M):
        k = load_rows(key, span.keys, hk, j, end, variant.BLOCK_M)
        s, cap_slope = scaled(tl.dot(q, tl.trans(k), input_precision=variant.PRECISION), scaling)
        s = context_scores(s, masks, sizes, span, b, h, n, i, j, tl.arange(0, variant.BLOCK_M)[None, :])
        v = load_rows(value, span.keys, hk, j, end, variant.BLOCK_M)
        ds = score_gradient(d_o, v, d, s, LOG2E, cap_slope, L, rest, variant)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=variant.PRECISION)
    return dq


@triton.jit
def score_gradient(d_o, v, d, s, unit, slope, L, rest, variant):
    """p (dO vᵀ - δ) times a slope for scores [queries, keys]."""
    p = softmax_weights(s, unit, L[:, None], rest[:, None], variant) * slope
    return p * (tl.dot(d_o, tl.trans(v), input_precision=variant.PRECISION) - d[:, None])


def launch(
    call: Call,
    shared: dict[str, Any],
    output: Tensor,
    d_output: Tensor,
    per_query: PerQuery,
    d_query: Tensor | None,
) -> Launch:
    own = {
        "output": arguments.rows(output),
        "d_output": arguments.rows(d_output),
        "per_query": per_query,
        "d_query": arguments.written_rows(d_query),
    }
    return over_queries(backward_queries_kernel, call, "queries", shared | own)
