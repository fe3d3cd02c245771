"""δ, and the prefix's part of the gradient of the queries, if others compute the context's part.

With the log-sum-exp L and the output O of prefix and context together:

    δ = rowsum(dO ∘ O)        p = exp(g(s) - L)        dq += c Σ_j [p (dO v'ᵀ - δ) g'(s)] k'        s = c q k'ᵀ

Tiles are those of prefix_forward.py. The other kernels read δ, so this kernel also runs if query needs no gradient.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import Call, PerQuery
from .backward_queries import score_gradient
from .gate import gated_with_derivatives
from .launch import Launch, over_stacked_rows
from .scaling import scaled
from .tiles import (
    LOG2E,
    gate_parameter,
    length_of,
    load_lse,
    load_rows,
    load_stacked,
    next_prefix,
    prefix_of,
    prefix_scores,
    stacked_per_query,
    stacked_rows,
    store_stacked,
)


@triton.jit
def prefix_queries_kernel(
    query, prefix, gate, masks, order, output, d_output, per_query, d_query, sizes, scaling, variant
):
    hk, b, h, n, exists = stacked_rows(sizes, order, variant)
    row = stacked_per_query(sizes, b, h, n)
    d_o = load_stacked(d_output, b, h, n, exists)
    o = load_stacked(output, b, h, n, exists)
    d = tl.sum(d_o.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(per_query.delta + row, d, mask=exists)

    if d_query.pointer is not None:
        q = load_stacked(query, b, h, n, exists)
        L, rest = load_lse(per_query, 0, row, exists, variant)
        dq = tl.zeros([variant.BLOCK_N, query.BLOCK_D], tl.float32)
        task, length = prefix_of(prefix, b[:, None])  # each row's own
        alpha = gate_parameter(gate.alpha, task, h[:, None])
        tau = gate_parameter(gate.tau, task, h[:, None])
        if prefix.index is None:
            dq = over_prefix(
                dq, q, d_o, d, L, rest, alpha, tau, task, length, length, hk, b, h, n,
                prefix, gate, masks, sizes, scaling, variant,
            )  # fmt: skip
        else:
            t = tl.min(task)
            while t < prefix.n_prefixes:
                end = length_of(prefix, t)
                seen = tl.where(task == t, length, 0)
                dq = over_prefix(
                    dq, q, d_o, d, L, rest, alpha, tau, t, end, seen, hk, b, h, n,
                    prefix, gate, masks, sizes, scaling, variant,
                )  # fmt: skip
                t = next_prefix(prefix, task, t)
        dq = load_stacked(d_query, b, h, n, exists).to(tl.float32) + dq * scaling.factor
        store_stacked(d_query, b, h, n, exists, dq)


@triton.jit
def over_prefix(
    dq, q, d_o, d, L, rest, alpha, tau, t, length, seen, hk, b, h, n, prefix, gate, masks, sizes, scaling, variant
):
    """Add a prefix to the sum; each row sees its first `seen` rows, a number or [BLOCK_N, 1]."""
    for p in range(0, length, variant.BLOCK_P):
        j = tl.arange(0, variant.BLOCK_P)[None, :]
        k = load_rows(prefix.key, t, hk, p, length, variant.BLOCK_P)
        s, cap_slope = scaled(tl.dot(q, tl.trans(k), input_precision=variant.PRECISION), scaling)
        g, slope, _, _ = gated_with_derivatives(s, alpha, tau, gate.name, gate.fast_tanh)
        g = prefix_scores(g, masks, sizes.N, seen, b[:, None], h[:, None], 0, n[:, None], p, j)
        v = load_rows(prefix.value, t, hk, p, length, variant.BLOCK_P)
        ds = score_gradient(d_o, v, d, g, LOG2E, slope * cap_slope, L, rest, variant)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=variant.PRECISION)
    return dq


def launch(
    call: Call,
    shared: dict[str, Any],
    output: Tensor,
    d_output: Tensor,
    per_query: PerQuery,
    d_query: Tensor | None,
) -> Launch:
    own = {
        "order": None if d_query is None else arguments.samples_by_prefix(call),
        "output": arguments.rows(output),
        "d_output": arguments.rows(d_output),
        "per_query": per_query,
        "d_query": arguments.written_rows(d_query),
    }
    return over_stacked_rows(prefix_queries_kernel, call, "prefix-queries", shared | own)
