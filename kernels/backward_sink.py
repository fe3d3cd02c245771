"""The gradient of the sinks, one score of each head that has no value:

    d sink = -Σ p δ        p = exp(sink - L)        over the queries of all samples

A program has one head and adds its queries in a fixed order. Packed sequences count as one sample.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from . import arguments
from .arguments import Call, PerQuery
from .backward_keys import first_query, load_delta
from .launch import Launch, variant_for
from .tiles import LOG2E, load_lse, load_sink, query_rows, softmax_weights, span_of


@triton.jit
def backward_sink_kernel(sink, output, d_output, per_query, d_sink, sizes, variant):
    h = tl.program_id(0)
    s = load_sink(sink, h, variant)
    total = tl.zeros([variant.BLOCK_N], tl.float32)
    tiles = tl.cdiv(sizes.N, variant.BLOCK_N)
    for step in range(0, tiles * sizes.B):
        b = step // tiles
        span = span_of(sizes, b)
        n = first_query(step % tiles, variant)
        start, row, exists = query_rows(sizes, span, h, n, variant)
        L, rest = load_lse(per_query, start, row, exists, variant)
        d = load_delta(output, d_output, per_query, sizes, span, h, n, variant)
        # A query of no sequence sees nothing, and its δ is whatever was in memory.
        total -= tl.where(L == float("inf"), 0.0, softmax_weights(s, LOG2E, L, rest, variant) * d)
    tl.store(d_sink + h, tl.sum(total, 0).to(d_sink.dtype.element_ty))


def launch(call: Call, output: Tensor, d_output: Tensor, per_query: PerQuery, d_sink: Tensor) -> Launch:
    assert call.sink is not None
    variant, options = variant_for(call, "queries")
    given = {
        "sink": call.sink.contiguous(),
        "output": arguments.rows(output),
        "d_output": arguments.rows(d_output),
        "per_query": per_query,
        "d_sink": d_sink,
        "sizes": arguments.sizes(replace(call, cu_seqlens_query=None, cu_seqlens_key=None)),
        "variant": variant.marked(),
    }
    return Launch(backward_sink_kernel, call.query.shape[1], given, options)
