"""The backward pass: at most five launches, each computing only what some gradient needs, and one more for sinks.

fold                k', v' again
backward_whole      if the context fits into one tile: δ, dq, dk, dv and the prefix's gradients in parts; otherwise
backward_queries    δ, dq
backward_keys       dk, dv; the prefix's gradients in parts
backward_prefix     sums of the parts: dK, dα, dτ
backward_reweighting    dU, dV
backward_sink       the sinks' gradient
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import (
    arguments,
    backward_keys,
    backward_prefix,
    backward_queries,
    backward_reweighting,
    backward_sink,
    backward_whole,
)
from .arguments import Call, PerQuery, contiguous_like, empty_rows_like, scratch
from .backward_keys import Parts
from .fold import folded
from .launch import Launch, run

CONTEXT = ("query", "key", "value")  # their gradients keep their memory order


def backward(
    call: Call, output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor, needed: Sequence[str]
) -> list[Tensor]:
    """Return the gradients of the call's tensors with these names, each in its input's shape and dtype."""
    gradients = rooms(call, needed)
    if call.cu_seqlens_query is not None:  # unchecked offsets may leave rows out
        for name in gradients.keys() & set(CONTEXT):
            gradients[name].zero_()
    run(
        f"backward {' '.join(gradients)}",
        call,
        (output, lse, lse_rest, d_output, *gradients.values()),
        lambda: launches(call, output, lse, lse_rest, d_output, gradients),
    )
    return list(gradients.values())


def launches(
    call: Call, output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor, gradients: dict[str, Tensor]
) -> Iterator[Launch]:
    """Yield the launches that fill the gradients."""
    as_seen, folding = folded(call)
    if gradients.keys() - {"key", "value"}:
        yield from folding
    shared = arguments.attention(as_seen)
    if backward_whole.takes(call, gradients):
        parts = backward_keys.empty_parts(call, "whole", **parts_needed(gradients))
        per_query = PerQuery(lse, lse_rest, delta=None)
        yield backward_whole.launch(call, shared, output, d_output, per_query, gradients, parts)
        yield from launches_over_parts(call, parts, gradients)
    else:
        per_query = PerQuery(lse, lse_rest, delta=scratch(lse, lse.shape, lse.dtype))
        yield backward_queries.launch(call, shared, output, d_output, per_query, gradients.get("query"))
        yield from launches_over_keys(call, shared, d_output, per_query, gradients)
    if "sink" in gradients:
        yield backward_sink.launch(call, output, d_output, per_query, gradients["sink"])


def launches_over_keys(
    call: Call, shared: dict[str, Any], d_output: Tensor, per_query: PerQuery, gradients: dict[str, Tensor]
) -> Iterator[Launch]:
    """Yield the launches that fill all gradients except query's, given δ; `shared` are arguments of the folded call."""
    d_key, d_value = gradients.get("key"), gradients.get("value")
    parts = backward_keys.empty_parts(call, "keys", **parts_needed(gradients))
    if parts.needed or d_key is not None or d_value is not None:
        yield backward_keys.launch(call, shared, d_output, per_query, d_key, d_value, parts)
    yield from launches_over_parts(call, parts, gradients)


def launches_over_parts(call: Call, parts: Parts, gradients: dict[str, Tensor]) -> Iterator[Launch]:
    """Yield the launches that fill the prefix's gradients from their parts."""
    if not parts.needed:
        return
    totals = (
        _total(call.prefix_key, parts.key, gradients, {"U_key", "V_key"}),
        _total(call.prefix_value, parts.value, gradients, {"U_value", "V_value"}),
    )
    yield backward_prefix.launch(call, parts, gradients, *totals)
    if any(total is not None for total in totals):
        yield backward_reweighting.launch(call, gradients, *totals)


def _total(stored: Tensor, parts: Tensor | None, gradients: dict[str, Tensor], names: set[str]) -> Tensor | None:
    """Allocate dk' or dv' if a gradient of U or V needs it."""
    if parts is None or gradients.keys().isdisjoint(names):
        return None
    return scratch(stored, stored.shape, torch.float32)


def parts_needed(gradients: dict[str, Tensor]) -> dict[str, bool]:
    """Return which of the prefix's gradients are computed in parts."""
    return {
        "key": not gradients.keys().isdisjoint({"prefix_key", "U_key", "V_key"}),
        "value": not gradients.keys().isdisjoint({"prefix_value", "U_value", "V_value"}),
        "gate": not gradients.keys().isdisjoint({"gate_alpha", "gate_tau"}),
    }


def empty_gradients(call: Call, needed: Sequence[str]) -> list[Tensor]:
    """Allocate the gradients of the call's tensors with these names."""
    return list(rooms(call, needed).values())


def rooms(call: Call, needed: Sequence[str]) -> dict[str, Tensor]:
    """Allocate the same by name. Gradients of query, key and value keep the memory order; those of the prefix are
    contiguous."""
    return {name: (empty_rows_like if name in CONTEXT else contiguous_like)(getattr(call, name)) for name in needed}
