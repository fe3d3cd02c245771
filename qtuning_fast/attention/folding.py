"""From the gradients of a prefix's folded rows, k' = W ∘ K and v', to those of what they were folded from."""

from __future__ import annotations

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.reference import stored_rows


def unfolded(call: PrefixAttentionCall, side: str, d_rows: Tensor) -> dict[str, Tensor]:
    """Return the gradients of K, U and V, in their shapes and dtypes, from that of k' = (U V) ∘ K; likewise for v'.

    Args:
        side: "key" or "value".
        d_rows: `[T, Hkv, P, D]`, in the scores' dtype; T is 1 without a bank.
    """
    rows, weights = side_of(call, side)
    name = f"prefix_{side}"
    if weights is None:
        return {name: d_rows.reshape(rows.shape).to(rows.dtype)}
    K, U, V = (as_bank(call, x.to(torch.promote_types(x.dtype, d_rows.dtype))) for x in (rows, *weights))
    shared = torch.arange(U.shape[1], device=U.device) < call.n_shared
    U = U.masked_fill(shared[:, None], 0)  # its shared rows may hold anything, NaN included
    if call.prefix_length is not None:  # and so may all rows beyond a prefix's length
        inside = stored_rows(call)
        K, U = K.where(inside[:, None, :, None], 0), U.where(inside[..., None], 0)
    W = torch.einsum("tpr,trhd->thpd", U, V).masked_fill_(shared[:, None], 1)
    by_weight = (d_rows * K).masked_fill_(shared[:, None], 0)
    gradients = {
        name: d_rows * W,
        f"U_{side}": torch.einsum("thpd,trhd->tpr", by_weight, V),
        f"V_{side}": torch.einsum("thpd,tpr->trhd", by_weight, U),
    }
    return {
        n: x.reshape(like.shape).to(like.dtype).contiguous()
        for (n, x), like in zip(gradients.items(), (rows, *weights))
    }


def side_of(call: PrefixAttentionCall, side: str) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return the stored rows of a side, "key" or "value", and U and V of its reweighting."""
    return (call.prefix_key, call.reweight_key) if side == "key" else (call.prefix_value, call.reweight_value)


def as_bank(call: PrefixAttentionCall, x: Tensor) -> Tensor:
    """Return a tensor of the prefix with the dimension T, which it has with a bank only."""
    return x[None] if call.prefix_index is None else x


def reduced(parameter: float | Tensor, gradient: Tensor) -> Tensor:
    """Sum the gradient [T, Hq] of alpha or tau to the parameter's shape."""
    if not isinstance(parameter, Tensor):
        return gradient
    shape = (1,) * (2 - parameter.ndim) + parameter.shape
    return gradient.sum_to_size(shape).reshape(parameter.shape).to(parameter.dtype)
