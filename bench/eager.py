"""Prefix attention in plain PyTorch, as the authors of NoRGa and Q-tuning would write it.

Other peers are made of the same pieces.
"""

import torch
from torch import Tensor

from qtuning_fast.attention.reference import within_reach
from qtuning_fast.bench.shapes import PrefixAttentionCall

Reweighting = tuple[Tensor, Tensor] | None  # U [P, R], V [R, Hkv, D]; with a bank both with a leading T


def attend(call: PrefixAttentionCall) -> Tensor:
    """Computes the operator: products in query's dtype, as in models' eager attention; gate and softmax in float32."""
    G, P = call.query.shape[1] // call.key.shape[1], call.prefix_key.shape[-2]
    key, value = (x.repeat_interleave(G, dim=1) if G > 1 else x for x in concatenated(call))
    s = (call.query @ key.mT).float() * call.scale
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    s_pre, s_ctx = s[..., :P], s[..., P:]
    if call.gate is not None:
        s_pre = s_pre + per_head(call, call.alpha) * torch.tanh(per_head(call, call.tau) * s_pre)
    s = torch.cat([s_pre, _masked(s_ctx, call)], dim=-1)
    return s.softmax(dim=-1).to(value.dtype) @ value


def concatenated(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, P + M, D], with the reweighted prefix in front of the context of every sample."""
    return (
        in_front(prefix_rows(call, call.prefix_key, call.reweight_key), call.key),
        in_front(prefix_rows(call, call.prefix_value, call.reweight_value), call.value),
    )


def prefix_rows(call: PrefixAttentionCall, rows: Tensor, reweighting: Reweighting) -> Tensor:
    """The reweighted rows [Hkv, P, D], for a bank [B, Hkv, P, D], in their own precision and rounded once."""
    if reweighting is not None:
        U, V = reweighting
        W = (U.mT[..., :, None, :, None] * V[..., :, :, None, :]).sum(-4)
        is_shared = torch.arange(rows.shape[-2], device=rows.device)[:, None] < call.n_shared
        rows = torch.where(is_shared, rows, W * rows)
    rows = rows.to(call.query.dtype)
    return rows if call.prefix_index is None else rows[call.prefix_index]


def in_front(rows: Tensor, context: Tensor) -> Tensor:
    return torch.cat([rows.expand(context.shape[0], -1, -1, -1), context], dim=2)


def per_head(call: PrefixAttentionCall, parameter: float | Tensor) -> float | Tensor:
    """alpha or tau, for scores [B, Hq, N, P]."""
    if not isinstance(parameter, Tensor):
        return parameter
    return (parameter if call.prefix_index is None else parameter[call.prefix_index])[..., None, None]


def _masked(s: Tensor, call: PrefixAttentionCall) -> Tensor:
    """The scores of the context [B, Hq, N, M], with hidden ones at -inf."""
    if call.attn_mask is not None:
        s = s + call.attn_mask
    if call.padding_mask is not None:
        s = s.masked_fill(~call.padding_mask[:, None, None, :], -torch.inf)
    visible = within_reach(call)
    return s if visible is None else s.masked_fill(~visible, -torch.inf)
