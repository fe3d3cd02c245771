"""Sinks: a score s of each head that joins the softmax of prefix and context after them.

L' = log(exp L + exp s)        o' = o exp(L - L')        d s = -Σ exp(s - L') δ,  δ = rowsum(dO ∘ o')
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import score_dtype


def merge(sink: Tensor, output: Tensor, lse: Tensor, lse_rest: Tensor) -> None:
    """Merge sinks [Hq] into attention without them, in place.

    Args:
        output: [B, Hq, N, Dv]; 0 for a query that sees nothing.
        lse: [B, Hq, N]; -inf for such a query.
        lse_rest: [B, Hq, N] to be added to lse; empty if there is nothing to add.
    """
    s = sink.to(lse.dtype)[:, None].expand_as(lse)
    below = _plus(lse, lse_rest)
    total = torch.logaddexp(below, s.to(below.dtype))
    weight = (below - total.masked_fill(total.isneginf(), 0)).exp()
    output.mul_(weight.to(lse.dtype)[..., None])
    lse.copy_(total)
    if lse_rest.numel():
        lse_rest.copy_((total - lse.to(total.dtype)).nan_to_num_(0.0))


def gradient(call: PrefixAttentionCall, output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor) -> Tensor:
    """Return the gradient of the sinks [Hq], in their dtype; output and log-sum-exp are those with the sinks."""
    assert call.sink is not None
    dtype = score_dtype(call.query)
    delta = (d_output.to(dtype) * output.to(dtype)).sum(-1)
    total = _plus(lse, lse_rest).masked_fill(lse.isneginf(), torch.inf)
    weight = (call.sink.to(total.dtype)[:, None] - total).exp().to(dtype)
    return (weight * delta).sum((0, 2)).neg().to(call.sink.dtype)


def _plus(lse: Tensor, rest: Tensor) -> Tensor:
    """Return the log-sum-exp with its rest, in float64 where there is one: float32 would lose it."""
    return lse.double() + rest.double() if rest.numel() else lse
