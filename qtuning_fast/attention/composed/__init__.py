"""The backend "composed": a vendor's flash attention for the context, our own code for the prefix only.

The operator splits at the log-sum-exp. If (o_c, L_c) is attention over the context alone and (o_p, L_p) attention over
the gated prefix, then

    L = log(exp L_c + exp L_p)        o = o_c exp(L_c - L) + o_p exp(L_p - L)

Given o and L, a flash attention's backward pass returns the exact gradients of the context part, because it rebuilds
p = exp(s - L) and δ = rowsum(dO ∘ O) from them. `context` splits the context into calls that a vendor computes
correctly. The prefix part (Triton kernels on a GPU, batched products on a CPU) merges in place and adds to dq. Sinks
are merged last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from qtuning_fast.attention import fused, sink
from qtuning_fast.attention.arguments import CONTEXT, PrefixAttentionCall
from qtuning_fast.attention.composed import context
from qtuning_fast.attention.composed.cpu import prefix_part as prefix_part_on_cpu
from qtuning_fast.attention.composed.vendors import EFFICIENT, FEW_QUERIES, Vendor, vendor_for
from qtuning_fast.attention.custom_op import Outputs, operator


def why_not(call: PrefixAttentionCall) -> str | None:
    """Return why this backend cannot compute a call, or None."""
    if call.softcap is not None:
        return "softcap: it does not cap scores"
    if call.query.is_cuda:
        obstacle = fused.why_not(call)
        if obstacle is not None:
            return obstacle
    vendor = vendor_for(call)
    if isinstance(vendor, Vendor):
        return None
    return "no vendor can compute the context: " + "; ".join(f"{name}: {why}" for name, why in vendor.items())


def only_by_name(call: PrefixAttentionCall) -> str | None:
    """Return why "auto" skips this backend for a call that it could compute, or None."""
    if call.query.is_cuda and call.query.shape[2] > FEW_QUERIES and vendor_for(call) is EFFICIENT:
        return f"for the context it has only {EFFICIENT.name}, which is not known to be faster than our own kernels"
    return None


def how(call: PrefixAttentionCall) -> str:
    """Return which vendor computes the context."""
    return f"context by {_vendor(call).name}"


class PrefixPart(Protocol):
    """A module that computes the prefix's part: one for the CPU, one of Triton kernels."""

    def keeps_rest(self, call: PrefixAttentionCall, /) -> bool:
        """Return whether the rounding residual of the log-sum-exp is kept."""

    def merge(self, call: PrefixAttentionCall, output: Tensor, lse: Tensor, lse_rest: Tensor, /) -> None:
        """Merge the prefix into attention over the context, in place."""

    def backward(
        self,
        call: PrefixAttentionCall,
        output: Tensor,
        lse: Tensor,
        lse_rest: Tensor,
        d_output: Tensor,
        d_query: Tensor | None,
        needed: Sequence[str],
        /,
    ) -> list[Tensor]:
        """Add the prefix's part to d_query, and return the gradients of the prefix's inputs that are needed."""


def prefix_part_for(call: PrefixAttentionCall) -> PrefixPart:
    """Return the module that computes the prefix part on the call's device."""
    if call.query.is_cuda:
        import qtuning_fast.kernels.prefix_part as prefix_part

        return prefix_part
    return prefix_part_on_cpu


class _Passes:
    """The passes of a vendor over the context, combined with those of the prefix part."""

    def forward(self, call: PrefixAttentionCall) -> Outputs:
        """Compute attention over the context, and merge the prefix into it."""
        prefix_part = prefix_part_for(call)
        results = context.forward(call, _vendor(call), prefix_part.keeps_rest(call))
        prefix_part.merge(call, *results)
        if call.sink is not None:
            sink.merge(call.sink, *results)
        return results

    def empty_outputs(self, call: PrefixAttentionCall) -> Outputs:
        """Allocate outputs with the shapes, strides and dtypes of `forward`'s."""
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
        """Return the gradients of the call's tensors of these names: the context's by the vendor, then the prefix's."""
        found: dict[str, Tensor] = {}
        if any(name in CONTEXT for name in needed):  # none is needed in a frozen backbone below the lowest prefix
            gradients = context.backward(call, _vendor(call), output, lse, lse_rest, d_output)
            found = dict(zip(CONTEXT, gradients))
        d_query = found["query"] if "query" in needed else None
        of_prefix = [name for name in needed if name not in CONTEXT and name != "sink"]
        if of_prefix or d_query is not None:
            d_prefix = prefix_part_for(call).backward(call, output, lse, lse_rest, d_output, d_query, of_prefix)
            found |= dict(zip(of_prefix, d_prefix))
        if "sink" in needed:
            found["sink"] = sink.gradient(call, output, lse, lse_rest, d_output)
        return [found[name] for name in needed]

    def empty_gradients(self, call: PrefixAttentionCall, needed: Sequence[str]) -> list[Tensor]:
        """Allocate gradients with the shapes, strides and dtypes of `backward`'s."""
        rooms = dict(zip(CONTEXT, context.empty_gradients(call, _vendor(call))))
        like = [getattr(call, name) for name in needed if name not in CONTEXT]
        return [rooms[name] for name in needed if name in CONTEXT] + [x.new_empty(x.shape) for x in like]


def _vendor(call: PrefixAttentionCall) -> Vendor:
    vendor = vendor_for(call)
    assert isinstance(vendor, Vendor), vendor
    return vendor


attend = operator("composed_attention", _Passes)
