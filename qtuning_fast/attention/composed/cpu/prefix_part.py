"""The prefix part of the composed backend on a CPU: batched matrix products over chunks of queries.

A chunk holds as many queries as keep their scores in the processor's cache, all from samples with the same prefix. Its
queries are stacked, [Hkv, rows, D], so that heads of a group and short sequences form one product. Its scores are
transposed, [Hkv, P, rows], so that sums over the prefix run along vectors. A chunk's tensors do not outlive it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import masked, score_dtype
from qtuning_fast.attention.composed.cpu.chunks import Chunk, chunks, largest_chunk
from qtuning_fast.attention.composed.cpu.gate import sigma, times_slope
from qtuning_fast.attention.folding import as_bank, reduced, side_of, unfolded
from qtuning_fast.attention.reference import bank_index, prefix_rows


def keeps_rest(call: PrefixAttentionCall) -> bool:
    """Return whether to keep the log-sum-exp's rounding residual: under additive masks, whose values may be large."""
    return call.has_additive_masks


def merge(call: PrefixAttentionCall, output: Tensor, lse: Tensor, lse_rest: Tensor) -> None:
    """Merge the prefix into attention over the context, in place.

    Args:
        output: [B, Hq, N, Dv] of the context alone; 0 for a query that sees none of it.
        lse: [B, Hq, N] of the context alone; -inf for such a query.
        lse_rest: [B, Hq, N] to be added to lse; empty if there is nothing to add.
    """
    order = _order(call)
    if order is None:
        _merge(call, output, lse, lse_rest)
        return
    wholes = (output, lse, lse_rest)
    parts = [_taken(x, order) for x in wholes]
    _merge(_of_samples(call, order), *parts)
    for whole, part in zip(wholes, parts):
        if whole.numel():
            whole[order] = part


def _merge(call: PrefixAttentionCall, output: Tensor, lse: Tensor, lse_rest: Tensor) -> None:
    keys, values = Folded(call, "key"), Folded(call, "value")
    for chunk in chunks(call):
        k, v = keys[chunk], values[chunk]
        L_c, rest = _lse(chunk, lse, lse_rest)
        g, _, _ = _gated_scores(chunk, k, chunk.read(call.query))
        largest = g.amax(1, keepdim=True)
        m = torch.maximum(largest, L_c)
        m.masked_fill_(m.isneginf(), 0)  # queries that see nothing
        g.sub_(m)
        below = L_c - m
        if rest is not None:  # it may be large: if the context dominates, all is relative to L_c + rest
            lead = rest.masked_fill(L_c < largest, 0)
            g.sub_(lead)
            below += rest - lead
        p, w = g.exp_(), below.exp_()  # [Hkv, P, rows] and, for the whole context, [Hkv, 1, rows]
        total = p.sum(1, keepdim=True).add_(w)
        above = total.log() if rest is None else total.log() + lead
        chunk.part(lse[..., None]).copy_(chunk.apart((m + above).mT))
        if rest is not None:
            left = (m - (m + above) + above).nan_to_num_(0.0)  # a query that sees nothing has -inf and no rest
            chunk.part(lse_rest[..., None]).copy_(chunk.apart(left.mT))
        total.masked_fill_(total == 0, 1)
        o = torch.bmm(p.mT, v, out=chunk.room("o", v)).div_(total.mT)
        part = chunk.part(output)
        torch.addcmul(chunk.apart(o), part, chunk.apart(w.div_(total).mT), out=part)


def backward(
    call: PrefixAttentionCall,
    output: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    d_output: Tensor,
    d_query: Tensor | None,
    needed: Sequence[str],
) -> list[Tensor]:
    """Add the prefix's part to d_query and return the needed gradients of the prefix's tensors."""
    order = _order(call)
    if order is None:
        return _backward(call, output, lse, lse_rest, d_output, d_query, needed)
    o, L, rest, d_o = (_taken(x, order) for x in (output, lse, lse_rest, d_output))
    part = None if d_query is None else d_query[order]
    gradients = _backward(_of_samples(call, order), o, L, rest, d_o, part, needed)
    if d_query is not None and part is not None:
        d_query[order] = part
    return gradients


def _backward(
    call: PrefixAttentionCall,
    output: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    d_output: Tensor,
    d_query: Tensor | None,
    needed: Sequence[str],
) -> list[Tensor]:
    keys, values = Folded(call, "key"), Folded(call, "value")
    d_keys, d_values = keys.zeros(), values.zeros()
    d_alpha, d_tau = (d_keys.new_zeros(len(d_keys), call.query.shape[1]) for _ in range(2))  # [T, Hq]
    for chunk in chunks(call):
        t, k, v = chunk.prefix, keys[chunk], values[chunk]
        q, d_o = chunk.read(call.query), chunk.read(d_output)
        delta = torch.mul(d_o, chunk.read(output), out=chunk.room("o", v)).sum(-1, keepdim=True).mT  # [Hkv, 1, rows]
        L, rest = _lse(chunk, lse, lse_rest)
        g, s, y = _gated_scores(chunk, k, q)
        g.sub_(L.masked_fill(L.isneginf(), torch.inf))
        p = (g if rest is None else g.sub_(rest)).exp_()
        d_values[t, :, : chunk.length].baddbmm_(p, d_o)
        ds = dg = torch.bmm(v, d_o.mT, out=chunk.scores("dg")).sub_(delta).mul_(p)
        if call.gate is not None:
            alpha, tau = chunk.gate_parameter(call.alpha), chunk.gate_parameter(call.tau)
            slope = times_slope(call.gate, dg, s, tau, y, out=chunk.scores("slope"))
            if "gate_alpha" in needed:
                d_alpha[t] += chunk.by_head(torch.mul(dg, y, out=p).sum(1))
            if "gate_tau" in needed:
                d_tau[t] += chunk.by_head(torch.mul(slope, s, out=p).sum(1).mul_(alpha.squeeze(1)))
            ds = torch.addcmul(dg, slope, alpha * tau, out=p)
        d_keys[t, :, : chunk.length].baddbmm_(ds, q, alpha=call.scale)
        if d_query is not None:
            dq = chunk.room("o", k).baddbmm_(ds.mT, k, beta=0, alpha=call.scale)
            chunk.part(d_query).add_(chunk.apart(dq))
    gradients = unfolded(call, "key", d_keys) | unfolded(call, "value", d_values)
    gradients |= {"gate_alpha": reduced(call.alpha, d_alpha), "gate_tau": reduced(call.tau, d_tau)}
    return [gradients[name] for name in needed]


def _lse(chunk: Chunk, lse: Tensor, lse_rest: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return both for a chunk, [Hkv, 1, rows]."""
    return chunk.read(lse[..., None]).mT, chunk.read(lse_rest[..., None]).mT if lse_rest.numel() else None


def _gated_scores(chunk: Chunk, k: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return g(s) with the bias, s and σ(τ s), all [Hkv, P, rows]; without a gate the three are one tensor."""
    call = chunk.call
    s = chunk.scores("s").baddbmm_(k, q.mT, beta=0, alpha=call.scale)
    g = y = s
    if call.gate is not None:
        y = sigma(call.gate, s, chunk.gate_parameter(call.tau), out=chunk.scores("y"))
        g = torch.addcmul(s, y, chunk.gate_parameter(call.alpha), out=chunk.scores("g"))
    if call.prefix_bias is not None:
        g = masked(g.mT, chunk.bias(call.prefix_bias)).mT
    return g, s, y


class Folded:
    """k' or v' of the prefixes that chunks use, each [Hkv, length, D], as the products take it."""

    def __init__(self, call: PrefixAttentionCall, side: str) -> None:
        self._call, self._rows, self._weights = call, *side_of(call, side)
        self._known: dict[int, Tensor] = {}

    def __getitem__(self, chunk: Chunk) -> Tensor:
        if chunk.prefix not in self._known:
            self._known[chunk.prefix] = self._fold(chunk)
        return self._known[chunk.prefix]

    def zeros(self) -> Tensor:
        """Allocate the gradient of all prefixes, [T, Hkv, P, D], filled with zeros."""
        rows = as_bank(self._call, self._rows)
        return rows.new_zeros(rows.shape, dtype=score_dtype(self._call.query))

    def _fold(self, chunk: Chunk) -> Tensor:
        rows, weights = as_bank(self._call, self._rows)[chunk.prefix, :, : chunk.length], self._weights
        if weights is not None:
            U, V = (as_bank(self._call, x)[chunk.prefix] for x in weights)
            weights = U[: chunk.length], V
        alone = replace(self._call, prefix_index=None, prefix_length=None)
        return prefix_rows(alone, rows, weights).to(score_dtype(self._call.query))


def _order(call: PrefixAttentionCall) -> Tensor | None:
    """Return the samples sorted by prefix, or None if they are sorted already, packed or too long to be stacked."""
    if call.prefix_index is None or call.is_packed or call.query.shape[2] > largest_chunk(call):
        return None
    index = bank_index(call)
    return None if bool((index[1:] >= index[:-1]).all()) else torch.argsort(index, stable=True)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """Return the samples of x in that order; an empty x is returned as it is."""
    return x[order] if x.numel() else x


def _of_samples(call: PrefixAttentionCall, order: Tensor) -> PrefixAttentionCall:
    """Return the call with its samples in that order, without masks, which belong to the context."""
    assert call.prefix_index is not None
    bias = call.prefix_bias if call.prefix_bias is None or len(call.prefix_bias) == 1 else call.prefix_bias[order]
    return replace(
        call,
        query=call.query[order],
        prefix_index=call.prefix_index[order],
        prefix_bias=bias,
        padding_mask=None,
        attn_mask=None,
    )
