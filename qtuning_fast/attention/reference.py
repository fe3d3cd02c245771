"""Prefix attention by definition, in plain PyTorch; every other backend is tested against it.

For one query head with scale c (gate: Le et al., arXiv 2405.14124; W: Guo et al., arXiv 2404.14607; cap κ: Gemma 2,
arXiv 2408.00118; sink: GPT-OSS, arXiv 2508.10925; without κ, cap(s) = s):

    s_ctx = cap(c · q kᵀ) + mask,   cap(s) = κ·tanh(s/κ)          over the M context keys
    s_pre = g(cap(c · q k'ᵀ)) + bias,   g(s) = s + α·σ(τ·s)       over the P prefix rows
    k' = W_K ∘ K,  v' = W_V ∘ V,    W = U V                      the stored rows, reweighted
    o  = softmax([s_pre, s_ctx, sink]) [v' ; v ; 0]               one softmax over all

Query i stands at the context's position i + M - N. Of the context it sees the keys from `window_left` before to
`window_right` after its position, under causality none after it, less those that a mask hides. Packed sequences are
computed one by one.

Scores, gate and softmax are float32, or float64 for float64 input. Reweighted rows and softmax weights are rounded to
query's dtype before their products, as attention implementations do, so this module's error in 16 bits is the yardstick
for theirs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import GATES, masked, score_dtype
from qtuning_fast.attention.packed import sequences


def why_not(call: PrefixAttentionCall) -> str | None:
    """Return why this backend cannot compute a call, or None."""
    if call.is_packed and torch.compiler.is_compiling():
        return "packed sequences: compiled code cannot read where they begin"
    return None


def attend(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Compute attention over prefix and context, differentiable by plain autograd.

    Returns the output [B, Hq, N, Dv] in query's dtype and the detached log-sum-exp [B, Hq, N] in the scores' dtype.
    A query that sees nothing at all gets 0 and -inf, with a sink 0 and the sink, and passes no gradient.
    """
    if call.is_packed:
        return _attend_one_by_one(call)
    weights, lse = attention_weights(call)
    return weighted_values(call, weights), lse


def _attend_one_by_one(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Compute each packed sequence alone; a query of no sequence sees nothing."""
    spans, alone = zip(*sequences(call))
    outputs, lses = zip(*map(attend, alone))
    outside = spans[0].queries.start, call.query.shape[2] - spans[-1].queries.stop
    output = F.pad(torch.cat(outputs, dim=2), (0, 0, *outside))
    return output, F.pad(torch.cat(lses, dim=2), outside, value=-torch.inf)


def attention_weights(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Return the softmax weights [B, Hq, N, P + M] in query's dtype, prefix first, and the log-sum-exp."""
    scores = _context_scores(call)  # [B, Hq, N, M]
    if _has_prefix(call):
        prefix_key = prefix_rows(call, call.prefix_key, call.reweight_key)
        scores = torch.cat([_prefix_scores(call, prefix_key), scores], dim=-1)  # [B, Hq, N, P + M]
    if call.sink is not None:
        sink = call.sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    lse = scores.detach().logsumexp(dim=-1)

    blind = lse.isneginf().unsqueeze(-1)  # here softmax and its gradient would be NaN
    weights = scores.masked_fill(blind, 0).softmax(dim=-1).masked_fill(blind, 0)
    if call.sink is not None:
        weights = weights[..., :-1]  # it has no value
    return weights.to(call.query.dtype), lse


def weighted_values(call: PrefixAttentionCall, weights: Tensor) -> Tensor:
    """Return the output [B, Hq, N, Dv] in query's dtype from the weights of prefix and context."""
    M, dtype = call.key.shape[-2], score_dtype(call.query)
    if not _has_prefix(call):
        return _weighted_sum(weights, call.value, dtype).to(call.query.dtype)
    prefix_value = prefix_rows(call, call.prefix_value, call.reweight_value)
    w_pre, w_ctx = weights.split([weights.shape[-1] - M, M], dim=-1)
    output = _weighted_sum(w_pre, prefix_value, dtype) + _weighted_sum(w_ctx, call.value, dtype)
    return output.to(call.query.dtype)


def _has_prefix(call: PrefixAttentionCall) -> bool:
    """Return whether to compute the prefix's part: always, except that exported graphs have none without rows.

    (ONNX cannot reshape tensors without entries. Otherwise an empty prefix gets its empty gradients.)
    """
    return call.prefix_key.shape[-2] > 0 or not torch.compiler.is_exporting()


def prefix_rows(call: PrefixAttentionCall, rows: Tensor, reweight: tuple[Tensor, Tensor] | None) -> Tensor:
    """Reweight the stored rows in their own precision, then round: [Hkv, P, D], or [B, Hkv, P, D] from a bank."""
    stored = None if call.prefix_length is None else stored_rows(call)
    if call.prefix_index is not None:  # first of all: a bank may hold far more prefixes than the samples use
        index = bank_index(call)
        rows, reweight = rows[index], None if reweight is None else (reweight[0][index], reweight[1][index])
        stored = None if stored is None else stored[index]
    if stored is not None:  # rows beyond a prefix's length may hold anything, NaN included
        rows = rows.where(stored[:, None, :, None], 0)
    if reweight is not None:
        U, V = reweight
        if stored is not None:
            U = U.where(stored[:, :, None], 0)
        precision = torch.promote_types(rows.dtype, torch.promote_types(U.dtype, V.dtype))
        W = torch.einsum("...pr,...rhd->...hpd", U[..., call.n_shared :, :].to(precision), V.to(precision))
        shared, previous = rows.tensor_split([call.n_shared], dim=-2)
        rows = torch.cat([shared.to(precision), W * previous], dim=-2)
    return _rounded(rows, call.query.dtype)


def _prefix_scores(call: PrefixAttentionCall, prefix_key: Tensor) -> Tensor:
    """Return g(cap(c · q k'ᵀ)) + bias; -inf for rows beyond a prefix's length."""
    s = _capped(call, call.scale * _products(call.query, prefix_key))
    if call.gate is not None:
        alpha = _per_head(call, call.alpha, s.dtype)
        tau = _per_head(call, call.tau, s.dtype)
        s = s + alpha * GATES[call.gate](tau * s)
    if call.prefix_bias is not None:
        s = masked(s, call.prefix_bias)
    if call.prefix_length is not None:
        s = masked(s, stored_rows(call)[bank_index(call)][:, None, None, :])
    return s


def _context_scores(call: PrefixAttentionCall) -> Tensor:
    """Return cap(c · q kᵀ) + mask; -inf for keys that a query must not see."""
    s = _capped(call, call.scale * _products(call.query, call.key))
    if call.padding_mask is not None:
        s = masked(s, call.padding_mask[:, None, None, :])
    if call.attn_mask is not None:
        s = masked(s, call.attn_mask)
    reached = within_reach(call)
    return s if reached is None else masked(s, reached)


def within_reach(call: PrefixAttentionCall) -> Tensor | None:
    """Return a bool [N, M]: which keys causality and window leave each query; None: all."""
    before, after = call.keys_before, call.keys_after
    if before is None and after is None:
        return None
    return reached(call.query.shape[2], call.key.shape[2], before, after, call.query.device)


def reached(N: int, M: int, before: int | None, after: int | None, device: torch.device) -> Tensor:
    """Return a bool [N, M]: which keys so many before and after its position leave each query; None is no bound."""
    seen = torch.ones(N, M, dtype=torch.bool, device=device)  # entry [i, j] lies j - i from the diagonal
    seen = seen if after is None else seen.tril(M - N + after)
    return seen if before is None else seen.triu(M - N - before)


def _capped(call: PrefixAttentionCall, s: Tensor) -> Tensor:
    """Cap scaled scores to ±κ, before gate and masks, so that masked keys stay masked."""
    return s if call.softcap is None else call.softcap * torch.tanh(s / call.softcap)


def stored_rows(call: PrefixAttentionCall) -> Tensor:
    """Return a bool [T, P]: whether each row of a bank lies within its prefix's length."""
    assert call.prefix_length is not None
    return torch.arange(call.prefix_key.shape[-2], device=call.query.device) < call.prefix_length[:, None]


def bank_index(call: PrefixAttentionCall) -> Tensor:
    """Return each sample's prefix, [B], clamped as in kernels, because an accelerator's indices are not checked."""
    assert call.prefix_index is not None
    return call.prefix_index.long().clamp(0, call.prefix_key.shape[0] - 1)


def _per_head(call: PrefixAttentionCall, parameter: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Return alpha or tau in a shape that broadcasts with scores [B, Hq, N, P]."""
    if not isinstance(parameter, Tensor):
        return parameter
    if parameter.ndim == 2:  # one row for each prefix of the bank
        parameter = parameter[bank_index(call)]
    return parameter.to(dtype)[..., None, None]


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """Return q kᵀ, [B, Hq, N, M] in the scores' dtype; keys are [B, Hkv, M, D] or, shared by samples, [Hkv, M, D]."""
    dtype = score_dtype(query)
    batch = "b" if keys.ndim == 4 else ""
    grouped = _by_group(query.to(dtype), keys.shape[-3])
    return torch.einsum(f"bhgnd,{batch}hmd->bhgnm", grouped, keys.to(dtype)).flatten(1, 2)


def _weighted_sum(weights: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return p v, [B, Hq, N, Dv], summed in dtype; values are [B, Hkv, M, Dv] or [Hkv, M, Dv]."""
    batch = "b" if values.ndim == 4 else ""
    grouped = _by_group(weights.to(dtype), values.shape[-3])
    return torch.einsum(f"bhgnm,{batch}hmd->bhgnd", grouped, values.to(dtype)).flatten(1, 2)


def _by_group(x: Tensor, Hkv: int) -> Tensor:
    """Reshape [B, Hq, ...] to [B, Hkv, G, ...], so that the G query heads of a key head are adjacent."""
    return x.unflatten(1, (Hkv, x.shape[1] // Hkv))


def _rounded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Round rows to dtype's precision but keep their own dtype, so that a master weight's gradient stays as wide."""
    return rows if rows.dtype == dtype else rows + (rows.detach().to(dtype).to(rows.dtype) - rows.detach())
