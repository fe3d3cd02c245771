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

from qtuning_fast.attention.call import PrefixAttentionCall
from qtuning_fast.attention.composed import context
from qtuning_fast.attention.composed.cpu import prefix_part as prefix_part_on_cpu
from qtuning_fast.attention.composed.vendors import EFFICIENT, FEW_QUERIES, Vendor, vendor_for
from qtuning_fast.attention.custom_op import INPUTS, Outputs, Passes, arguments_of, operator


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


def _forward(call: PrefixAttentionCall) -> Outputs:
    prefix_part = prefix_part_for(call)
    results = context.forward(call, _vendor(call), prefix_part.keeps_rest(call))
    prefix_part.merge(call, *results)
    return results


def _empty_outputs(call: PrefixAttentionCall) -> Outputs:
    return context.empty_outputs(call, _vendor(call), prefix_part_for(call).keeps_rest(call))


def _backward(
    call: PrefixAttentionCall,
    output: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    d_output: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    d_context: tuple[Tensor, ...] = ()
    if any(needs[:3]):  # a frozen backbone below the lowest prefix needs none of them
        d_context = context.backward(call, _vendor(call), output, lse, lse_rest, d_output)
    d_query = d_context[0] if needs[0] else None
    d_prefix = prefix_part_for(call).backward(call, output, lse, lse_rest, d_output, d_query, needs)
    return [x for x, needed in zip(d_context, needs) if needed] + d_prefix


def _empty_gradients(call: PrefixAttentionCall, needs: Sequence[bool]) -> list[Tensor]:
    rooms = [*context.empty_gradients(call, _vendor(call)), *arguments_of(call)[3 : len(INPUTS)]]
    return [
        room if name in INPUTS[:3] else room.new_empty(room.shape)
        for name, room, needed in zip(INPUTS, rooms, needs)
        if needed
    ]


def _vendor(call: PrefixAttentionCall) -> Vendor:
    vendor = vendor_for(call)
    assert isinstance(vendor, Vendor), vendor
    return vendor


attend = operator("composed_attention", Passes(_forward, _empty_outputs, _backward, _empty_gradients))
