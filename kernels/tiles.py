"""Tiles of the operator's tensors: rows of query, key and value, reweighted prefix rows, scores under their masks.

A position is a start plus an offset within the tile, so that only starts need 64 bits. Offsets `i` of queries and `j`
of keys are two-dimensional, [BLOCK, 1] and [1, BLOCK] or the reverse, so the same functions serve scores
[queries, keys] and their transpose.
"""

import triton
import triton.language as tl

from .arguments import Span
from .scaling import scaled

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4e38)  # less than float32's largest number, which rounding must not exceed
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def query_tile(sizes, variant):
    """The sample, query head and first of its queries of this program; with causality the longest tiles start first."""
    tiles = tl.cdiv(sizes.N, variant.BLOCK_N)
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    return head // sizes.heads, head % sizes.heads, tile * variant.BLOCK_N


@triton.jit
def span_of(sizes, b):
    """The rows of sample b or, if sequences are packed, of sequence b."""
    if sizes.query_offsets is None:
        return Span(sizes.N, sizes.M, b, b)
    else:
        queries, N = packed_rows(sizes.query_offsets, b, sizes.queries, sizes.N)
        keys, M = packed_rows(sizes.key_offsets, b, sizes.keys, sizes.M)
        return Span(N, M, queries, keys)


@triton.jit
def packed_rows(offsets, b, rows, longest):
    """The first row of sequence b and their number, both clamped, because values on a device are unchecked."""
    first = tl.minimum(tl.maximum(tl.load(offsets + b), 0), rows)
    return first, tl.minimum(tl.maximum(tl.load(offsets + b + 1) - first, 0), tl.minimum(longest, rows - first))


@triton.jit
def query_rows(sizes, span, h, n, variant):
    """The start of a head's queries in a tensor [B, Hq, N], their offsets n..n+BLOCK_N, and which of them exist."""
    queries = n + tl.arange(0, variant.BLOCK_N)
    if sizes.query_offsets is None:
        start = tl.cast(span.queries * sizes.heads + h, tl.int64) * sizes.N
    else:
        start = tl.cast(h, tl.int64) * sizes.queries + span.queries
    return start, queries, queries < span.N


@triton.jit
def stacked_per_query(sizes, b, h, n):
    """The positions of stacked rows in a tensor [B, Hq, N]."""
    return (tl.cast(b, tl.int64) * sizes.heads + h) * sizes.N + n


@triton.jit
def context_range(sizes, span, n, variant):
    """The bounds of context tiles for queries n..n+BLOCK_N: begin, first, whole, end.

    Keys before `begin` and from `end` on are unseen, and keys first..whole need no mask. Without a bound on the keys
    before a query, begin = first.
    """
    position = n + span.M - span.N  # of query n in the context
    begin = 0
    first = 0
    whole = span.M
    end = span.M
    if sizes.after is not None:
        whole = tl.minimum(whole, tl.maximum(position + 1 + sizes.after, 0))
        end = tl.minimum(end, tl.maximum(position + variant.BLOCK_N + sizes.after, 0))
    if variant.HAS_MASK:
        whole = 0
    whole = whole // variant.BLOCK_M * variant.BLOCK_M
    if sizes.before is not None:
        begin = tl.maximum(position - sizes.before, 0) // variant.BLOCK_M * variant.BLOCK_M
        last = tl.maximum(position + variant.BLOCK_N - 1 - sizes.before, 0)  # the last query's first key
        first = tl.minimum(tl.cdiv(last, variant.BLOCK_M), tl.cdiv(end, variant.BLOCK_M)) * variant.BLOCK_M
        if variant.HAS_MASK:
            first = begin
        whole = tl.maximum(whole, first)
    return begin, first, whole, end


@triton.jit
def stacked_rows(sizes, order, variant):
    """The key head of this program, and of each of its rows the sample, query head and query, and whether it exists.

    The queries of a key head's G heads form one list, grouped by sample, with samples in `order` if given. Rows beyond
    its end repeat the last one.
    """
    count = sizes.B * sizes.group * sizes.N
    tiles = tl.cdiv(count, variant.BLOCK_N)
    hk = tl.program_id(0) // tiles
    r = tl.program_id(0) % tiles * variant.BLOCK_N + tl.arange(0, variant.BLOCK_N)
    exists = r < count
    r = tl.minimum(r, count - 1)
    b = r // sizes.N // sizes.group
    if order is not None:
        b = tl.load(order + b)
    return hk, b, hk * sizes.group + r // sizes.N % sizes.group, r % sizes.N, exists


@triton.jit
def stacked_pointers(rows, b, h, n):
    """Pointers [BLOCK, BLOCK_D] to the rows of samples b, heads h and queries n, each [BLOCK]."""
    first = tl.cast(b, tl.int64) * rows.outer + tl.cast(h, tl.int64) * rows.head + tl.cast(n, tl.int64) * rows.row
    return rows.pointer + first[:, None] + tl.arange(0, rows.BLOCK_D)[None, :]


@triton.jit
def load_stacked(rows, b, h, n, exists):
    """Load the rows of `stacked_pointers`; zeros for rows that do not exist and from column D on."""
    return tl.load(stacked_pointers(rows, b, h, n), mask=row_mask(rows, exists), other=0.0)


@triton.jit
def store_stacked(rows, b, h, n, exists, x):
    """The counterpart of load_stacked, in the tensor's dtype."""
    tl.store(stacked_pointers(rows, b, h, n), x.to(rows.pointer.dtype.element_ty), mask=row_mask(rows, exists))


@triton.jit
def row_pointers(rows, outer, head, start, BLOCK: tl.constexpr):
    """Pointers [BLOCK, BLOCK_D] to rows start..start+BLOCK of one head."""
    first = tl.cast(outer, tl.int64) * rows.outer + tl.cast(head, tl.int64) * rows.head
    first += tl.cast(start, tl.int64) * rows.row
    return rows.pointer + first + (tl.arange(0, BLOCK)[:, None] * rows.row + tl.arange(0, rows.BLOCK_D)[None, :])


@triton.jit
def row_mask(rows, exists):
    """The mask of a tile: rows that exist, columns before D."""
    inside = exists[:, None]
    if rows.D != rows.BLOCK_D:
        inside = inside & (tl.arange(0, rows.BLOCK_D) < rows.D)[None, :]
    return inside


@triton.jit
def load_rows(rows, outer, head, start, end, BLOCK: tl.constexpr):
    """Load rows start..start+BLOCK of a head, [BLOCK, BLOCK_D]; zeros from row `end` and from column D on."""
    inside = row_mask(rows, start + tl.arange(0, BLOCK) < end)
    return tl.load(row_pointers(rows, outer, head, start, BLOCK), mask=inside, other=0.0)


@triton.jit
def store_rows(rows, outer, head, start, end, x, BLOCK: tl.constexpr):
    """The counterpart of load_rows, in the tensor's dtype."""
    inside = row_mask(rows, start + tl.arange(0, BLOCK) < end)
    tl.store(row_pointers(rows, outer, head, start, BLOCK), x.to(rows.pointer.dtype.element_ty), mask=inside)


@triton.jit
def prefix_of(prefix, b):
    """The prefix of sample b and its length, both clamped, because values on a device are unchecked."""
    if prefix.index is None:
        t = tl.full([], 0, tl.int64)
    else:
        t = tl.load(prefix.index + b).to(tl.int64)
        tl.device_assert((t >= 0) & (t < prefix.n_prefixes), "prefix_index out of range")  # with TRITON_DEBUG=1
        t = within_bank(prefix, t)
    return t, length_of(prefix, t)


@triton.jit
def within_bank(prefix, t):
    """An index clamped to the number of prefixes."""
    return tl.minimum(tl.maximum(t, 0), prefix.n_prefixes - 1)


@triton.jit
def length_of(prefix, t):
    if prefix.length is None:
        return tl.full([], 0, tl.int32) + prefix.n_rows
    else:
        return tl.minimum(tl.maximum(tl.load(prefix.length + t).to(tl.int32), 0), prefix.n_rows)


@triton.jit
def next_prefix(prefix, task, t):
    """The next prefix after t among those of the rows, `task`; T if there is none."""
    return tl.min(tl.where(task > t, task, prefix.n_prefixes))


@triton.jit
def weight_rows(stored, n_shared, t, h, start, length, BLOCK: tl.constexpr):
    """W = U V for rows start..start+BLOCK of one head, [BLOCK, BLOCK_D] in float32; 1 for shared rows."""
    weights = stored.weights
    p = start + tl.arange(0, BLOCK)
    d = tl.arange(0, stored.rows.BLOCK_D)
    U = weights.U + t * weights.U_prefix + p.to(tl.int64) * weights.U_row
    V = weights.V + t * weights.V_prefix + tl.cast(h, tl.int64) * weights.V_head + d
    previous = (p >= n_shared) & (p < length)
    W = tl.zeros([BLOCK, stored.rows.BLOCK_D], tl.float32)
    for r in range(weights.rank):
        u = tl.load(U + r, mask=previous, other=0.0).to(tl.float32)
        v = tl.load(V + r * weights.V_rank, mask=d < stored.rows.D, other=0.0).to(tl.float32)
        W += u[:, None] * v[None, :]
    return tl.where((p < n_shared)[:, None], 1.0, W)


@triton.jit
def gate_parameter(parameter, t, h):
    """alpha or tau of prefix t and query head h."""
    if parameter.pointer is None:
        return parameter.value
    else:
        return tl.load(parameter.pointer + t * parameter.prefix + h * parameter.head).to(tl.float32)


@triton.jit
def load_sink(sink, h, variant):
    """The sink of head h; counted in powers of 2, it must not overflow."""
    s = tl.load(sink + h).to(tl.float32)
    return s if variant.EXACT else tl.minimum(s, LARGEST / LOG2E)


@triton.jit
def unmasked_scores(products, scaling, variant):
    """Unmasked scores, the factor that turns them into powers of 2, and the cap's derivative."""
    if variant.EXACT or scaling.cap is not None:
        s, cap_slope = scaled(products, scaling)
        return s, LOG2E, cap_slope
    else:
        return products, scaling.factor * LOG2E, 1.0


@triton.jit
def softmax_weights(s, unit, L, rest, variant):
    """exp(s - log-sum-exp) of scores times unit, with the result of load_lse broadcast to the scores' shape."""
    if variant.EXACT:
        return tl.exp2((s - L - rest) * LOG2E)
    else:
        return tl.exp2(s * unit - L)


@triton.jit
def load_lse(per_query, start, row, exists, variant):
    """The log-sum-exp of queries start+row: natural and with its rest if EXACT, else in powers of 2.

    It is +inf for a query that sees nothing or does not exist, so that its weights are 0.
    """
    L = tl.load(per_query.lse + start + row, mask=exists, other=float("-inf"))
    blind = L == float("-inf")
    if variant.EXACT:
        rest = tl.load(per_query.rest + start + row, mask=exists, other=0.0)
    else:
        L *= LOG2E
        rest = tl.zeros_like(L)
    return tl.where(blind, float("inf"), L), rest


@triton.jit
def store_lse(per_query, start, row, exists, m, l, rest, variant):
    """The counterpart of load_lse: from the running maximum and sum of an online softmax; -inf where l = 0.

    If EXACT, plus `rest`.
    """
    blind = l == 0.0
    log_l = tl.log2(tl.where(blind, 1.0, l))
    if variant.EXACT:
        total = m + (log_l * LN2 + rest)
        tl.store(per_query.rest + start + row, tl.where(blind, 0.0, m - total + (log_l * LN2 + rest)), mask=exists)
    else:
        total = (m + log_l) * LN2
    tl.store(per_query.lse + start + row, tl.where(blind, float("-inf"), total), mask=exists)


@triton.jit
def within_reach(sizes, span, n, i, m, j):
    """Whether keys m+j lie within the reach of queries n+i, which is bounded on one side at least."""
    if sizes.before is None:
        near = m + j <= n + i + span.M - span.N + sizes.after
    else:
        near = m + j >= n + i + span.M - span.N - sizes.before
        if sizes.after is not None:
            near = near & (m + j <= n + i + span.M - span.N + sizes.after)
    return near


@triton.jit
def context_scores(s, masks, sizes, span, b, h, n, i, m, j):
    """The scores s of context keys m+j for queries n+i under masks, -inf where a query must not see a key."""
    inside = m + j < span.M
    if sizes.before is not None or sizes.after is not None:
        inside = inside & within_reach(sizes, span, n, i, m, j)
    if masks.padding.pointer is not None:
        s = masked(s, load_overlay(masks.padding, b, 0, 0, j * 0, m, j, m + j < span.M))  # once for all queries
    if masks.full.pointer is not None:
        s = masked(s, load_overlay(masks.full, b, h, n, i, m, j, inside & (n + i < span.N)))
    return tl.where(inside, s, float("-inf"))


@triton.jit
def prefix_scores(g, masks, N, length, b, h, n, i, p, j):
    """Gated scores of prefix rows p+j for queries before N under the bias, -inf from `length` on."""
    inside = p + j < length
    if masks.bias.pointer is not None:
        g = masked(g, load_overlay(masks.bias, b, h, n, i, p, j, inside & (n + i < N)))
    return tl.where(inside, g, float("-inf"))


@triton.jit
def load_overlay(overlay, b, h, n, i, m, j, inside):
    start = tl.cast(b, tl.int64) * overlay.sample + tl.cast(h, tl.int64) * overlay.head
    start += tl.cast(n, tl.int64) * overlay.query + tl.cast(m, tl.int64) * overlay.key
    within = i.to(tl.int64) * overlay.query + j.to(tl.int64) * overlay.key
    return tl.load(overlay.pointer + start + within, mask=inside, other=0)


@triton.jit
def masked(s, mask):
    """Scores under a mask; uint8 is bool. A dtype's most negative finite number means -inf."""
    if mask.dtype == tl.uint8:
        return tl.where(mask != 0, s, float("-inf"))
    else:
        hidden = mask.to(tl.float32) <= most_negative(mask.dtype)
        return tl.where(hidden, float("-inf"), s + mask.to(tl.float32))


@triton.jit
def most_negative(DTYPE: tl.constexpr):
    """The most negative finite number of a dtype as a float32; of float64, which goes further, -inf."""
    if DTYPE == tl.float16:
        return -65504.0
    elif DTYPE == tl.bfloat16:
        return -3.3895313892515355e38
    elif DTYPE == tl.float32:
        return -3.4028234663852886e38
    else:
        return float("-inf")
