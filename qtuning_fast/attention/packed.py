"""Packed sequences: several in one row of a call, each with its own queries, keys and prefix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall


class Span(NamedTuple):
    """The rows of one sequence."""

    queries: slice
    keys: slice


def spans(call: PrefixAttentionCall) -> list[Span]:
    """Return the rows of each packed sequence, for which an accelerator waits; unchecked offsets are clamped."""
    assert call.cu_seqlens_query is not None and call.key_offsets is not None
    queries = _cut(call.cu_seqlens_query, call.query.shape[2])
    return [Span(*both) for both in zip(queries, _cut(call.key_offsets, call.key.shape[2]))]


def sequences(call: PrefixAttentionCall) -> Iterator[tuple[Span, PrefixAttentionCall]]:
    """Yield the rows of each packed sequence, and the sequence as a call of its own, of views."""
    for sequence, span in enumerate(spans(call)):
        yield span, _alone(call, sequence, span)


def _alone(call: PrefixAttentionCall, sequence: int, span: Span) -> PrefixAttentionCall:
    """Return the call of one sequence."""
    bias, index = call.prefix_bias, call.prefix_index
    return replace(
        call,
        query=call.query[:, :, span.queries],
        key=call.key[:, :, span.keys],
        value=call.value[:, :, span.keys],
        prefix_index=None if index is None else index[sequence : sequence + 1],
        prefix_bias=bias if bias is None or len(bias) == 1 else bias[sequence : sequence + 1],
        cu_seqlens_query=None,
        cu_seqlens_key=None,
        max_seqlen_query=None,
        max_seqlen_key=None,
    )


def _cut(offsets: Tensor, rows: int) -> list[slice]:
    ends = offsets.clamp(0, rows).cummax(0).values.tolist()
    return [slice(*both) for both in pairwise(ends)]
