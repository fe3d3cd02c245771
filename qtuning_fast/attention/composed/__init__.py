"""Backend "composed": a vendor's flash attention for the context, our own work for the prefix only.

The operator splits at the log-sum-exp. With (o_c, L_c) attention over the context alone and (o_p, L_p) over the gated
prefix,

    L = log(exp L_c + exp L_p)        o = o_c exp(L_c - L) + o_p exp(L_p - L)

and a flash attention's backward pass that is handed o and L gives the exact gradients of the context part, because it
rebuilds p = exp(s - L) and δ = rowsum(dO ∘ O) from them. `context` cuts the context into calls that a vendor does
right; the prefix part, on a GPU Triton kernels and on a CPU batched products, merges in place and adds to dq.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.composed import context
from qtuning_fast.attention.composed.cpu import prefix_part as prefix_part_on_cpu
from qtuning_fast.attention.composed.vendors import EFFICIENT, FEW_QUERIES, Vendor, vendor_for
from qtuning_fast.attention.custom_op import Outputs, operator

CONTEXT = ("query", "key", "value")  # what has a gradient from the context


def why_not(call: PrefixAttentionCall) -> str | None:
    """What keeps it from a call."""
    if call.softcap is not None:
        return "softcap: it does not cap scores"
    if call.query.is_cuda:
        from qtuning_fast.attention import fused

        obstacle = fused.why_not(call)
        if obstacle is not None:
            return obstacle
    vendor = vendor_for(call)
    if isinstance(vendor, Vendor):
        return None
    return "no attention for the context can do it: " + "; ".join(f"{name}: {why}" for name, why in vendor.items())


def only_by_name(call: PrefixAttentionCall) -> str | None:
    """Why "auto" passes by what it could do."""
    if call.query.is_cuda and call.query.shape[2] > FEW_QUERIES and vendor_for(call) is EFFICIENT:
        return f"of the context it could ask only {EFFICIENT.name}, which is not known to outrun our own kernels"
    return None


def how(call: PrefixAttentionCall) -> str:
    """By whom the context is done."""
    return f"context by {_vendor(call).name}"


def prefix_part_for(call: PrefixAttentionCall) -> Any:
    """The module that computes the prefix part: `merge`, `backward`, `keeps_rest`."""
    if call.query.is_cuda:
        import qtuning_fast.kernels.prefix_part as prefix_part

        return prefix_part
    return prefix_part_on_cpu


class _Passes:
    """A vendor's passes over the context, and the prefix part's."""

    def forward(self, call: PrefixAttentionCall) -> Outputs:
        prefix_part = prefix_part_for(call)
        results = context.forward(call, _vendor(call), prefix_part.keeps_rest(call))
        prefix_part.merge(call, *results)
        return results

    def empty_outputs(self, call: PrefixAttentionCall) -> Outputs:
        return context.empty_outputs(call, _vendor(call), prefix_part_for(call).keeps_rest(call))

    def backward(
        self,
        call: PrefixAttentionCall,
        output: Tensor,
        lse: Tensor,
        lse_rest: Tensor,
        d_output: Tensor,
        needed: Sequence[str],
    ) -> list[Tensor]:
        d_context: dict[str, Tensor] = {}
        if any(name in CONTEXT for name in needed):  # a frozen backbone below the lowest prefix needs none of them
            gradients = context.backward(call, _vendor(call), output, lse, lse_rest, d_output)
            d_context = dict(zip(CONTEXT, gradients))
        d_query = d_context["query"] if "query" in needed else None
        of_prefix = [name for name in needed if name not in CONTEXT]
        d_prefix = prefix_part_for(call).backward(call, output, lse, lse_rest, d_output, d_query, of_prefix)
        return [d_context[name] for name in needed if name in CONTEXT] + d_prefix

    def empty_gradients(self, call: PrefixAttentionCall, needed: Sequence[str]) -> list[Tensor]:
        rooms = dict(zip(CONTEXT, context.empty_gradients(call, _vendor(call))))
        like = [getattr(call, name) for name in needed if name not in CONTEXT]
        return [rooms[name] for name in needed if name in CONTEXT] + [x.new_empty(x.shape) for x in like]


def _vendor(call: PrefixAttentionCall) -> Vendor:
    vendor = vendor_for(call)
    assert isinstance(vendor, Vendor), vendor
    return vendor


attend = operator("composed_attention", _Passes)
