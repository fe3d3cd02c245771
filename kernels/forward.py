"""The forward kernel: softmax([g(c q k'ᵀ), c q kᵀ]) [v' ; v] in one pass, without writing scores to memory.

A program has one tile of queries of one head. It loops over the prefix tiles, whose scores it gates, then over the
context tiles within causality and window. It keeps the running maximum m, the running sum l and the unnormalised output
of the online softmax:

    m' = max(m, max_j s_j)    p_j = exp(s_j - m')    l' = l exp(m - m') + Σ_j p_j    acc' = acc exp(m - m') + p v

A sink is where m starts, with l = 1. Context tiles that all queries of the tile see entirely need no mask.

Exponentials are powers of 2. For 16-bit inputs log₂e is folded into the scores' unit, and m counts powers of 2, which
takes one multiply-add a score. Its rounding shows in float32 and under an additive mask, whose values may be large (at
-1e9 the rounding of m alone changes weights by a factor of 2^64). In the variant EXACT, for these cases, m is natural,
s - m is computed first, and the log-sum-exp is stored with its rounding residual.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import Call
from .fold import folded
from .gate import gated
from .launch import Launch, is_exact, over_queries, run
from .scaling import scaled
from .tiles import (
    LOG2E,
    context_range,
    context_scores,
    gate_parameter,
    load_rows,
    load_sink,
    prefix_of,
    prefix_scores,
    query_rows,
    query_tile,
    span_of,
    store_lse,
    store_rows,
    unmasked_scores,
)


@triton.jit
def forward_kernel(query, key, value, prefix, gate, masks, sink, output, per_query, sizes, scaling, variant):
    b, h, n = query_tile(sizes, variant)
    span = span_of(sizes, b)
    if sizes.query_offsets is not None:  # noqa: SIM102 (known when it is compiled; the other one is not)
        if n >= span.N:
            return
    hk = h // sizes.group
    i = tl.arange(0, variant.BLOCK_N)[:, None]
    q = load_rows(query, span.queries, h, n, span.N, variant.BLOCK_N)
    acc = tl.zeros([variant.BLOCK_N, value.BLOCK_D], tl.float32)
    m, l = empty_softmax(sink, h, variant)

    t, length = prefix_of(prefix, b)
    alpha = gate_parameter(gate.alpha, t, h)
    tau = gate_parameter(gate.tau, t, h)
    for p in range(0, length, variant.BLOCK_P):
        k = load_rows(prefix.key, t, hk, p, length, variant.BLOCK_P)
        v = load_rows(prefix.value, t, hk, p, length, variant.BLOCK_P)
        s, _ = scaled(tl.dot(q, tl.trans(k), input_precision=variant.PRECISION), scaling)
        g = gated(s, alpha, tau, gate.name, gate.fast_tanh)
        g = prefix_scores(g, masks, span.N, length, b, h, n, i, p, tl.arange(0, variant.BLOCK_P)[None, :])
        acc, m, l = online_softmax(acc, m, l, g, LOG2E, v, variant)

    begin, first, whole, end = context_range(sizes, span, n, variant)
    if sizes.before is not None:
        acc, m, l = masked_context(
            acc, m, l, q, key, value, b, h, hk, n, i, begin, first, end, masks, sizes, span, scaling, variant
        )
    if not variant.HAS_MASK:
        for j in range(first, whole, variant.BLOCK_M):
            k = load_rows(key, span.keys, hk, j, whole, variant.BLOCK_M)
            s = tl.dot(q, tl.trans(k), input_precision=variant.PRECISION)
            s, unit, _ = unmasked_scores(s, scaling, variant)
            v = load_rows(value, span.keys, hk, j, whole, variant.BLOCK_M)
            acc, m, l = online_softmax(acc, m, l, s, unit, v, variant)
    acc, m, l = masked_context(
        acc, m, l, q, key, value, b, h, hk, n, i, whole, end, end, masks, sizes, span, scaling, variant
    )

    store_rows(output, span.queries, h, n, span.N, acc / tl.where(l == 0.0, 1.0, l)[:, None], variant.BLOCK_N)
    start, row, exists = query_rows(sizes, span, h, n, variant)
    store_lse(per_query, start, row, exists, m, l, 0.0, variant)


@triton.jit
def empty_softmax(sink, h, variant):
    """The running maximum and sum of an online softmax over nothing but the sink, if there is one."""
    m = tl.full([variant.BLOCK_N], float("-inf"), tl.float32)
    l = tl.zeros([variant.BLOCK_N], tl.float32)
    if sink is not None:
        s = load_sink(sink, h, variant)
        l += tl.where(s == float("-inf"), 0.0, 1.0)
        m = tl.maximum(m, s if variant.EXACT else s * LOG2E)
    return m, l


@triton.jit
def masked_context(
    acc, m, l, q, key, value, b, h, hk, n, i, start, stop, end, masks, sizes, span, scaling, variant
):  # fmt: skip
    """Add the context tiles start..stop, which some queries do not see entirely."""
    for j in range(start, stop, variant.BLOCK_M):
        k = load_rows(key, span.keys, hk, j, end, variant.BLOCK_M)
        s, _ = scaled(tl.dot(q, tl.trans(k), input_precision=variant.PRECISION), scaling)
        s = context_scores(s, masks, sizes, span, b, h, n, i, j, tl.arange(0, variant.BLOCK_M)[None, :])
        v = load_rows(value, span.keys, hk, j, end, variant.BLOCK_M)
        acc, m, l = online_softmax(acc, m, l, s, LOG2E, v, variant)
    return acc, m, l


@triton.jit
def online_softmax(acc, m, l, s, unit, v, variant):
    """Add a tile of scores s, where s * unit counts powers of 2, and of values v."""
    if variant.EXACT:
        m_new = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row without any visible key so far
        p = tl.exp2((s - finite[:, None]) * LOG2E)
        shrink = tl.exp2((m - finite) * LOG2E)
    else:
        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * unit - finite[:, None])
        shrink = tl.exp2(m - finite)
    l = l * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=variant.PRECISION)
    return acc, m_new, l


def launch(call: Call, output: Tensor, lse: Tensor, lse_rest: Tensor) -> Launch:
    """Return the launch for a call with a folded prefix."""
    own = {
        "sink": None if call.sink is None else call.sink.contiguous(),
        "output": arguments.written_rows(output),
        "per_query": arguments.PerQuery(lse, lse_rest, None),
    }
    return over_queries(forward_kernel, call, "forward", arguments.attention(call) | own)


def launches(call: Call, output: Tensor, lse: Tensor, lse_rest: Tensor) -> Iterator[Launch]:
    call, folding = folded(call)
    yield from folding
    yield launch(call, output, lse, lse_rest)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the log-sum-exp and the latter's rounding residual, shaped as in empty_outputs."""
    outputs = empty_outputs(call)
    if call.cu_seqlens_query is not None:  # of no sequence are queries that unchecked offsets leave out
        outputs[0].zero_()
        outputs[1].fill_(-torch.inf)
        outputs[2].zero_()
    run("forward", call, outputs, lambda: launches(call, *outputs))
    return outputs


def empty_outputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output [B, Hq, N, Dv], in the memory order [B, N, Hq, Dv] that models use next, the log-sum-exp
    [B, Hq, N], and its rest: of the same shape if EXACT, else empty."""
    B, Hq, N, _ = call.query.shape
    output = call.query.new_empty(B, N, Hq, call.value.shape[-1]).transpose(1, 2)
    lse = call.query.new_empty(B, Hq, N, dtype=torch.float32)
    return output, lse, torch.empty_like(lse) if is_exact(call) else lse.new_empty(0)
