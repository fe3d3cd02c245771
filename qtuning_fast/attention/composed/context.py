"""The context part of the composed backend: attention by a vendor, in pieces that the vendor computes correctly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import masked, score_dtype
from qtuning_fast.attention.composed.vendors import Attention, Vendor

ALL = slice(None)
NEAR = 256.0  # additive masks up to this magnitude are not shifted


class Piece(NamedTuple):
    """Some queries that attend to some keys. Queries and keys that share no piece do not see each other."""

    queries: slice
    keys: slice
    is_causal: bool  # aligned bottom-right


def pieces(call: PrefixAttentionCall, vendor: Vendor) -> Sequence[Piece]:
    """Split the context into disjoint pieces that cover it."""
    N, M = call.query.shape[2], call.key.shape[2]
    if 0 in call.query.shape or M == 0:
        return ()
    if not call.is_causal or N == 1:
        return (Piece(ALL, ALL, False),)
    if N == M or (N < M and vendor.bottom_right):
        return (Piece(ALL, ALL, True),)
    if N < M:  # all queries see the first M - N keys
        return (Piece(ALL, slice(M - N), False), Piece(ALL, slice(M - N, None), True))
    return (Piece(slice(N - M, None), ALL, True),)  # the first N - M queries see none


def forward(call: PrefixAttentionCall, vendor: Vendor, keeps_rest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute attention over the context alone.

    Returns:
        Output, log-sum-exp and the latter's rest, to be added to it, shaped as in `empty_outputs`. A query that sees
        nothing gets 0 and -inf. Masks and causality decide which queries these are, because vendors' reports differ.
    """
    mask, shift = _additive(call)
    parts = pieces(call, vendor)
    if [piece.queries for piece in parts] == [ALL]:
        o, L = _seen(_attention(call, mask, parts[0]), vendor)
        like, like_lse, _ = empty_outputs(call, vendor, keeps_rest, device="meta")
        output, lse = _laid_out(o, like), _laid_out(L, like_lse)
    else:
        output, lse, _ = empty_outputs(call, vendor, keeps_rest)
        output.zero_()
        lse.fill_(-torch.inf)
        for piece in parts:
            o, L = _seen(_attention(call, mask, piece), vendor)
            _merge(output[:, :, piece.queries], lse[:, :, piece.queries], o, L)
    if not keeps_rest:
        return output, lse, lse.new_empty(0)
    total = lse + shift
    return output, total, (shift - total + lse).nan_to_num_(0.0)


def backward(
    call: PrefixAttentionCall, vendor: Vendor, output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the context's gradients of query, key and value, given the global output and log-sum-exp."""
    mask, shift = _additive(call)
    parts = pieces(call, vendor)
    if lse_rest.numel():
        lse = lse - shift + lse_rest
    lse = lse.masked_fill(lse.isneginf(), torch.inf)  # a query that sees nothing: exp(s - lse) must be 0
    d_output = _laid_out(d_output, output)
    if [piece.queries for piece in parts] == [ALL]:
        found = vendor.backward(_attention(call, mask, parts[0]), output, lse, d_output)
        dq, dk, dv = (_laid_out(x, room) for x, room in zip(found, empty_gradients(call, vendor, device="meta")))
        return dq, dk, dv
    dq, dk, dv = (room.zero_() for room in empty_gradients(call, vendor))
    for queries, keys, is_causal in parts:
        x = _attention(call, mask, Piece(queries, keys, is_causal))
        found = vendor.backward(x, output[:, :, queries], lse[:, :, queries], d_output[:, :, queries])
        dq[:, :, queries] += found[0]
        dk[:, :, keys] = found[1]
        dv[:, :, keys] = found[2]
    return dq, dk, dv


def empty_outputs(
    call: PrefixAttentionCall, vendor: Vendor, keeps_rest: bool, device: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate output [B, Hq, N, Dv], log-sum-exp [B, Hq, N] and its rest, of the latter's shape or empty.

    On the device "meta" they have shapes and strides only.
    """
    output = _room(call.query, call.value.shape[-1], vendor, device)
    lse = output.new_empty(call.query.shape[:3], dtype=score_dtype(call.query))
    return output, lse, torch.empty_like(lse) if keeps_rest else lse.new_empty(0)


def empty_gradients(
    call: PrefixAttentionCall, vendor: Vendor, device: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the gradients of query, key and value."""
    dq, dk, dv = (_room(x, x.shape[-1], vendor, device) for x in (call.query, call.key, call.value))
    return dq, dk, dv


def _room(x: Tensor, columns: int, vendor: Vendor, device: str | None) -> Tensor:
    """Allocate a tensor like x [B, H, N, D] with another D, in the memory order of the vendor's results."""
    B, H, N, D = x.shape
    if vendor.keeps_layout and columns == D and x.stride(-1) == 1:
        return torch.empty_like(x, device=device)
    return x.new_empty(B, N, H, columns, device=device or x.device).transpose(1, 2)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Return x with like's strides, copied only if its memory order differs."""
    if all(a == b or n == 1 for a, b, n in zip(x.stride(), like.stride(), x.shape)):
        return x if x.stride() == like.stride() else x.as_strided(x.shape, like.stride())
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _attention(call: PrefixAttentionCall, mask: Tensor | None, piece: Piece) -> Attention:
    """Return a vendor's input for a piece."""
    queries, keys, is_causal = piece
    if mask is not None:
        mask = mask[:, :, queries if mask.shape[2] > 1 else ALL, keys if mask.shape[3] > 1 else ALL]
    query, key, value = (
        x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (call.query, call.key, call.value)
    )
    return Attention(query[:, :, queries], key[:, :, keys], value[:, :, keys], mask, is_causal, call.scale)


def _additive(call: PrefixAttentionCall) -> tuple[Tensor | None, float | Tensor]:
    """Return the 4-D additive mask on the context in the scores' dtype, and the shift subtracted from it a query.

    The mask is -inf where a query must not see a key. Subtracting a number from all scores of a query does not change
    attention. The shift is the largest mask value that the query sees, which keeps its log-sum-exp near its scores
    however far the mask's values are from 0. Under causality queries see different keys, so a mask row shared by all
    queries is expanded to one row a query.
    """
    padding = None if call.padding_mask is None else call.padding_mask[:, None, None, :]
    masks = [_narrowed(mask) for mask in (padding, call.attn_mask) if mask is not None]
    if not masks:
        return None, 0.0
    additive = torch.zeros(masks[0].shape, dtype=score_dtype(call.query), device=masks[0].device)
    for mask in masks:
        additive = masked(additive, mask)
    if all(mask.dtype == torch.bool for mask in masks) or 0 in additive.shape:
        return additive, 0.0
    N, M = call.query.shape[2], call.key.shape[2]
    if call.is_causal and additive.shape[3] == M:
        hidden = torch.ones(N, M, dtype=torch.bool, device=mask.device).triu(M - N + 1)
        additive = additive.masked_fill(hidden, -torch.inf)
    shift = additive.amax(-1, keepdim=True)
    shift = shift.masked_fill(shift.isinf() | (shift.abs() <= NEAR), 0)
    return additive.sub_(shift), shift.squeeze(-1)


def _narrowed(mask: Tensor) -> Tensor:
    """Undo expanded dimensions, which would be written out."""
    for dim, stride in enumerate(mask.stride()):
        mask = mask.narrow(dim, 0, 1) if stride == 0 and mask.shape[dim] else mask
    return mask


def _seen(x: Attention, vendor: Vendor) -> tuple[Tensor, Tensor]:
    """Return a vendor's output and log-sum-exp, set to 0 and -inf for queries that see nothing."""
    output, lse = vendor.forward(x)
    if x.mask is None:
        return output, lse
    visible = x.mask > -torch.inf
    N, M = x.query.shape[2], x.key.shape[2]
    if not x.is_causal:
        sees = visible.any(-1)
    elif visible.shape[2] == 1:  # a query sees something if the first visible key is not after its last key
        last = torch.arange(M - N, M, device=visible.device)
        sees = visible.any(-1) & (visible.byte().argmax(-1) <= last)
    else:
        sees = visible.tril(M - N).any(-1)
    return output.masked_fill_(~sees[..., None], 0), lse.masked_fill_(~sees, -torch.inf)


def _merge(output: Tensor, lse: Tensor, o: Tensor, L: Tensor) -> None:
    """Merge attention over more keys, (o, L), into output and lse in place."""
    total = torch.logaddexp(lse, L)
    finite = total.masked_fill(total.isneginf(), 0)
    output.copy_(output * (lse - finite).exp()[..., None] + o * (L - finite).exp()[..., None])
    lse.copy_(total)
