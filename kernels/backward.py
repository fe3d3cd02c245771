"""The backward pass: five launches at most, and of each only what some gradient needs.

fold                k', v' once more
backward_whole      where the context fits into one tile: δ, dq, dk, dv and the prefix's gradients in parts; else
backward_queries    δ, dq
backward_keys       dk, dv; the prefix's gradients in parts
backward_prefix     the parts added up: dK, dα, dτ
backward_reweighting    dU, dV
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
    backward_whole,
)
from .arguments import PerQuery, contiguous_like, empty_rows_like, scratch
from .backward_keys import Parts
from .fold import folded
from .launch import Launch
from .replay import run

# What may need a gradient, in the order of the operators' arguments.
INPUTS = (
    "query", "key", "value", "prefix_key", "prefix_value",
    "U_key", "V_key", "U_value", "V_value", "gate_alpha", "gate_tau",
)  # fmt: skip


def backward(
    call: Any, output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of those INPUTS that `needs` says, in their order, each of its input's shape and dtype."""
    gradients = empty_gradients(call, needs)
    run(
        f"backward {' '.join(gradients)}",
        call,
        (output, lse, lse_rest, d_output, *gradients.values()),
        lambda: launches(call, output, lse, lse_rest, d_output, gradients),
    )
    return list(gradients.values())


def launches(
    call: Any, output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor, gradients: dict[str, Tensor]
) -> Iterator[Launch]:
    """What fills the gradients."""
    as_seen, folding = folded(call)
    if gradients.keys() - {"key", "value"}:
        yield from folding
    shared = arguments.attention(as_seen)
    if backward_whole.takes(call, gradients):
        parts = backward_keys.empty_parts(call, "whole", **parts_needed(gradients))
        per_query = PerQuery(lse, lse_rest, delta=None)
        yield backward_whole.launch(call, shared, output, d_output, per_query, gradients, parts)
        yield from launches_over_parts(call, parts, gradients)
        return
    per_query = PerQuery(lse, lse_rest, delta=scratch(lse, lse.shape, lse.dtype))
    yield backward_queries.launch(call, shared, output, d_output, per_query, gradients.get("query"))
    yield from launches_over_keys(call, shared, d_output, per_query, gradients)


def launches_over_keys(
    call: Any, shared: dict[str, Any], d_output: Tensor, per_query: PerQuery, gradients: dict[str, Tensor]
) -> Iterator[Launch]:
    """What fills all gradients but the queries', once their δ is there; `shared` are arguments of the folded call."""
    d_key, d_value = gradients.get("key"), gradients.get("value")
    parts = backward_keys.empty_parts(call, "keys", **parts_needed(gradients))
    if parts.needed or d_key is not None or d_value is not None:
        yield backward_keys.launch(call, shared, d_output, per_query, d_key, d_value, parts)
    yield from launches_over_parts(call, parts, gradients)


def launches_over_parts(call: Any, parts: Parts, gradients: dict[str, Tensor]) -> Iterator[Launch]:
    """What fills the prefix's gradients, once their parts are there."""
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
    """Room for dk' or dv', if a gradient of U or V comes from it."""
    if parts is None or gradients.keys().isdisjoint(names):
        return None
    return scratch(stored, stored.shape, torch.float32)


def parts_needed(gradients: dict[str, Tensor]) -> dict[str, bool]:
    """Which of the prefix's gradients come in parts first."""
    return {
        "key": not gradients.keys().isdisjoint({"prefix_key", "U_key", "V_key"}),
        "value": not gradients.keys().isdisjoint({"prefix_value", "U_value", "V_value"}),
        "gate": not gradients.keys().isdisjoint({"gate_alpha", "gate_tau"}),
    }


def empty_gradients(call: Any, needs: Sequence[bool]) -> dict[str, Tensor]:
    """Room by name. Query, key and value keep the order of their memory; what belongs to the prefix is contiguous."""
    inputs = named_inputs(call)
    return {
        name: empty_rows_like(inputs[name]) if name in INPUTS[:3] else contiguous_like(inputs[name])
        for name, needed in zip(INPUTS, needs)
        if needed
    }


def named_inputs(call: Any) -> dict[str, Any]:
    U_key, V_key = call.reweight_key or (None, None)
    U_value, V_value = call.reweight_value or (None, None)
    return {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "prefix_key": call.prefix_key,
        "prefix_value": call.prefix_value,
        "U_key": U_key,
        "V_key": V_key,
        "U_value": U_value,
        "V_value": V_value,
        "gate_alpha": call.gate_alpha,
        "gate_tau": call.gate_tau,
    }
