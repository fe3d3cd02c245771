"""The merge of the prefix into attention over the context alone, its output o_c and log-sum-exp L_c.

    L = log(exp(L_c) + Σ_j exp(s_j))        o = exp(L_c - L) o_c + Σ_j exp(s_j - L) v'_j        s = g(c q k'ᵀ)

This is the online softmax of forward.py over the prefix, started from the context's result: m = L_c, l = 1, acc = o_c
(if EXACT, with the rest r of L_c, l = exp(r) and acc = l o_c). For a query that saw no context it starts empty. o_c and
L_c are read once and overwritten.

A program has one tile of a key head's rows: the queries of all samples and of all G heads of its group. If a sample has
few queries, as in decoding, the prefix is thus read once a tile instead of once a sample. With a bank, samples are
sorted by prefix, and a program loops only over the prefixes of its rows; rows of other prefixes are masked.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import Call, PerQuery
from .forward import online_softmax
from .gate import gated
from .launch import Launch, over_stacked_rows
from .scaling import scaled
from .tiles import (
    LOG2E,
    gate_parameter,
    length_of,
    load_rows,
    load_stacked,
    next_prefix,
    prefix_of,
    prefix_scores,
    stacked_per_query,
    stacked_rows,
    store_lse,
    store_stacked,
)

LARGEST_REST = tl.constexpr(64.0)  # more of it only where L_c is so far out that prefix or context weighs nothing


@triton.jit
def merge_kernel(query, prefix, gate, masks, order, output, per_query, sizes, scaling, variant):
    hk, b, h, n, exists = stacked_rows(sizes, order, variant)
    row = stacked_per_query(sizes, b, h, n)
    q = load_stacked(query, b, h, n, exists)
    acc = load_stacked(output, b, h, n, exists).to(tl.float32)
    m = tl.load(per_query.lse + row, mask=exists, other=float("-inf"))
    l = tl.where(m == float("-inf"), 0.0, 1.0)
    if variant.EXACT:
        rest = tl.load(per_query.rest + row, mask=exists, other=0.0)
        within = tl.minimum(tl.maximum(rest, -LARGEST_REST), LARGEST_REST)
        l *= tl.exp2(within * LOG2E)
        acc *= l[:, None]
        L_c = m
    else:
        m *= LOG2E

    task, length = prefix_of(prefix, b[:, None])  # each row's own
    alpha = gate_parameter(gate.alpha, task, h[:, None])
    tau = gate_parameter(gate.tau, task, h[:, None])
    if prefix.index is None:
        acc, m, l = over_prefix(
            acc, m, l, q, alpha, tau, task, length, length, hk, b, h, n, prefix, gate, masks, sizes, scaling,
            variant,
        )  # fmt: skip
    else:
        t = tl.min(task)
        while t < prefix.n_prefixes:
            end = length_of(prefix, t)
            seen = tl.where(task == t, length, 0)
            acc, m, l = over_prefix(
                acc, m, l, q, alpha, tau, t, end, seen, hk, b, h, n, prefix, gate, masks, sizes, scaling,
                variant,
            )  # fmt: skip
            t = next_prefix(prefix, task, t)

    tl.debug_barrier()  # several warps may read a row: all must finish before one writes
    store_stacked(output, b, h, n, exists, acc / tl.where(l == 0.0, 1.0, l)[:, None])
    if variant.EXACT:
        store_lse(per_query, 0, row, exists, m, l, tl.where(m == L_c, rest - within, 0.0), variant)
    else:
        store_lse(per_query, 0, row, exists, m, l, 0.0, variant)


@triton.jit
def over_prefix(acc, m, l, q, alpha, tau, t, length, seen, hk, b, h, n, prefix, gate, masks, sizes, scaling, variant):
    """Add a prefix to the sums; each row sees its first `seen` rows, a number or [BLOCK_N, 1]."""
    for p in range(0, length, variant.BLOCK_P):
        j = tl.arange(0, variant.BLOCK_P)[None, :]
        k = load_rows(prefix.key, t, hk, p, length, variant.BLOCK_P)
        v = load_rows(prefix.value, t, hk, p, length, variant.BLOCK_P)
        s, _ = scaled(tl.dot(q, tl.trans(k), input_precision=variant.PRECISION), scaling)
        g = gated(s, alpha, tau, gate.name, gate.fast_tanh)
        g = prefix_scores(g, masks, sizes.N, seen, b[:, None], h[:, None], 0, n[:, None], p, j)
        acc, m, l = online_softmax(acc, m, l, g, LOG2E, v, variant)
    return acc, m, l


def launch(call: Call, output: Tensor, lse: Tensor, lse_rest: Tensor) -> Launch:
    """Return the launch for a call with a folded prefix."""
    own = {
        "order": arguments.samples_by_prefix(call),
        "output": arguments.written_rows(output),
        "per_query": PerQuery(lse, lse_rest, None),
    }
    return over_stacked_rows(merge_kernel, call, "merge", arguments.attention_to_prefix(call) | own)
