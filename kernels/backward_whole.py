"""The backward pass if the context fits into one tile: δ, dq, dk, dv and the prefix's shares in one launch.

A program has all keys of one sample and key head, and loops over the queries of its G heads. Scores are transposed,
[keys, queries], and those of the context are recomputed once:

    δ = rowsum(dO ∘ O)        p = exp(s - L)        ds = p (dO vᵀ - δ) g'(s)        (g' = 1 in the context)
    dv = Σ p dO               dk = c Σ ds q         dq = c (ds'ᵀ k' + dsᵀ k)

So the context takes five products for each pair of query and key instead of the seven of `backward_queries` and
`backward_keys`, and query, key, value and dO are read once. Other programs of the same launch compute the prefix's own
gradients, as in `backward_keys`.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import Call, PerQuery
from .backward_keys import Parts, load_queries, next_tile, prefix_tile
from .gate import gated_with_derivatives
from .launch import MULTIPROCESSORS, Launch, at_most, blocks_of, variant_for
from .scaling import scaled
from .tiles import (
    LOG2E,
    context_scores,
    gate_parameter,
    load_rows,
    prefix_of,
    prefix_scores,
    softmax_weights,
    span_of,
    store_rows,
)


@triton.jit
def backward_whole_kernel(
    query, key, value, prefix, gate, masks, output, d_output, per_query, d_query, d_key, d_value, parts, sizes, scaling,
    variant, prefix_programs,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < prefix_programs:
        if parts.key is not None or parts.value is not None or parts.alpha is not None:
            prefix_tile(pid, query, prefix, gate, masks, output, d_output, per_query, parts, sizes, scaling, variant)
    else:
        whole_context(
            pid - prefix_programs, query, key, value, prefix, gate, masks, output, d_output, per_query,
            d_query, d_key, d_value, sizes, scaling, variant,
        )  # fmt: skip


@triton.jit
def whole_context(
    pid, query, key, value, prefix, gate, masks, output, d_output, per_query, d_query, d_key, d_value, sizes, scaling,
    variant,
):  # fmt: skip
    hk = pid % (sizes.heads // sizes.group)
    b = pid // (sizes.heads // sizes.group)
    span = span_of(sizes, b)
    t, length = prefix_of(prefix, b)
    k = load_rows(key, span.keys, hk, 0, span.M, variant.BLOCK_M)
    v = load_rows(value, span.keys, hk, 0, span.M, variant.BLOCK_M)
    k_pre = load_rows(prefix.key, t, hk, 0, length, variant.BLOCK_P)
    v_pre = load_rows(prefix.value, t, hk, 0, length, variant.BLOCK_P)
    dk = tl.zeros([variant.BLOCK_M, key.BLOCK_D], tl.float32)
    dv = tl.zeros([variant.BLOCK_M, value.BLOCK_D], tl.float32)
    i = tl.arange(0, variant.BLOCK_N)[None, :]
    tiles = tl.cdiv(span.N, variant.BLOCK_N)
    h = tl.cast(hk, tl.int32) * sizes.group
    tile = tl.full([], 0, tl.int32)
    for _ in range(0, tiles * sizes.group):
        n = tile * variant.BLOCK_N
        q, d_o, L, rest, d = load_queries(query, output, d_output, per_query, sizes, span, h, n, variant)

        s, cap_slope = scaled(tl.dot(k_pre, tl.trans(q), input_precision=variant.PRECISION), scaling)
        alpha = gate_parameter(gate.alpha, t, h)
        tau = gate_parameter(gate.tau, t, h)
        g, slope, _, _ = gated_with_derivatives(s, alpha, tau, gate.name, gate.fast_tanh)
        g = prefix_scores(g, masks, span.N, length, b, h, n, i, 0, tl.arange(0, variant.BLOCK_P)[:, None])
        p = softmax_weights(g, LOG2E, L, rest, variant)
        dg = p * (tl.dot(v_pre, tl.trans(d_o), input_precision=variant.PRECISION) - d)
        ds = (dg * slope * cap_slope).to(q.dtype)
        dq = tl.dot(tl.trans(ds), k_pre, input_precision=variant.PRECISION)

        s, cap_slope = scaled(tl.dot(k, tl.trans(q), input_precision=variant.PRECISION), scaling)
        s = context_scores(s, masks, sizes, span, b, h, n, i, 0, tl.arange(0, variant.BLOCK_M)[:, None])
        p = softmax_weights(s, LOG2E, L, rest, variant)
        dv = tl.dot(p.to(d_o.dtype), d_o, dv, input_precision=variant.PRECISION)
        ds = p * (tl.dot(v, tl.trans(d_o), input_precision=variant.PRECISION) - d)
        ds = (ds * cap_slope).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=variant.PRECISION)
        dq = tl.dot(tl.trans(ds), k, dq, input_precision=variant.PRECISION)
        store_rows(d_query, span.queries, h, n, span.N, dq * scaling.factor, variant.BLOCK_N)
        h, tile = next_tile(h, tile, 0, tiles)
    store_rows(d_key, span.keys, hk, 0, span.M, dk * scaling.factor, variant.BLOCK_M)
    store_rows(d_value, span.keys, hk, 0, span.M, dv, variant.BLOCK_M)


def takes(call: Call, gradients: dict[str, Tensor]) -> bool:
    """Return whether to use one launch: if query, key and value train, up to the number of keys in the table.

    Packed sequences are for the other kernels.
    """
    B, Hkv, M, _ = call.key.shape
    N, P = call.query.shape[2], call.prefix_key.shape[-2]
    blocks = blocks_of(call, "whole")
    return (
        gradients.keys() >= {"query", "key", "value"}
        and call.cu_seqlens_query is None
        and 0 < max(N, M) <= blocks.keys
        and P <= blocks.prefix
        and B * Hkv >= MULTIPROCESSORS  # fewer programs would leave some idle
    )


def launch(
    call: Call,
    shared: dict[str, Any],
    output: Tensor,
    d_output: Tensor,
    per_query: PerQuery,
    gradients: dict[str, Tensor],
    parts: Parts,
) -> Launch:
    variant, options = variant_for(call, "whole")
    B, Hkv, M, _ = call.key.shape
    prefix_programs = 0
    if parts.needed:
        prefix_programs = parts.shares * parts.tiles * arguments.n_prefixes(call) * call.query.shape[1]
    own = {
        "output": arguments.rows(output),
        "d_output": arguments.rows(d_output),
        "per_query": per_query,
        "d_query": arguments.written_rows(gradients["query"]),
        "d_key": arguments.written_rows(gradients["key"]),
        "d_value": arguments.written_rows(gradients["value"]),
        "parts": parts,
        "variant": variant._replace(BLOCK_M=at_most(variant.BLOCK_M, M)).marked(),
        "prefix_programs": prefix_programs,
    }
    return Launch(backward_whole_kernel, prefix_programs + B * Hkv, shared | own, options)
