"""The context part of the composed backend: attention by a vendor, in pieces that the vendor computes correctly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import score_dtype
from qtuning_fast.attention.composed.masks import Masks, shift_of, under_causality
from qtuning_fast.attention.composed.pieces import ALL, Piece, pieces
from qtuning_fast.attention.composed.vendors import Attention, Vendor


def forward(call: PrefixAttentionCall, vendor: Vendor, keeps_rest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute attention over the context alone.

    Returns:
        Output, log-sum-exp and the latter's rest, to be added to it, shaped as in `empty_outputs`. A query that sees
        nothing gets 0 and -inf. Masks and causality decide which queries these are, because vendors' reports differ.
    """
    cut = pieces(call, vendor)
    shift: float | Tensor = 0.0
    if _is_whole(cut):
        (part,) = _parts(call, cut)
        shift = part.shift
        o, L = _seen(part, vendor)
        like, like_lse, _ = empty_outputs(call, vendor, keeps_rest, device="meta")
        output, lse = _laid_out(o, like), _laid_out(L, like_lse)
    else:
        output, lse, _ = empty_outputs(call, vendor, keeps_rest)
        output.zero_()
        lse.fill_(-torch.inf)
        for part in _parts(call, cut):
            piece = part.piece
            o, L = _seen(part, vendor)
            if piece.again:
                _merge(piece.rows(output), piece.of_queries(lse), o, L)
            else:
                piece.rows(output).copy_(o)
                piece.of_queries(lse).copy_(L)
            if isinstance(part.shift, Tensor):
                shift = shift if isinstance(shift, Tensor) else torch.zeros_like(lse)
                piece.of_queries(shift).copy_(part.shift)
    if not keeps_rest:
        return output, lse, lse.new_empty(0)
    total = lse + shift
    return output, total, (shift - total + lse).nan_to_num_(0.0)


def backward(
    call: PrefixAttentionCall, vendor: Vendor, output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the context's gradients of query, key and value, given the global output and log-sum-exp."""
    cut = pieces(call, vendor)
    d_output = _laid_out(d_output, output)
    if _is_whole(cut):
        (part,) = _parts(call, cut)
        found = vendor.backward(part.x, output, _shifted(lse, lse_rest, part.shift), d_output)
        dq, dk, dv = (_laid_out(x, room) for x, room in zip(found, empty_gradients(call, vendor, device="meta")))
        return dq, dk, dv
    dq, dk, dv = (room.zero_() for room in empty_gradients(call, vendor))
    # Sums over pieces would be rounded to 16 bits once for each piece.
    sums = [x if len(cut) == 1 else x.to(torch.promote_types(x.dtype, torch.float32)) for x in (dk, dv)]
    for piece, x, shift, _ in _parts(call, cut):
        rest = piece.of_queries(lse_rest) if lse_rest.numel() else lse_rest
        L = _shifted(piece.of_queries(lse), rest, shift)
        found = vendor.backward(x, piece.rows(output), L, piece.rows(d_output))
        rows = piece.rows(dq)
        rows.copy_(rows + found[0] if piece.again else found[0])
        for total, gradient in zip(sums, found[1:]):
            piece.add_to_keys(total, gradient)
    for room, total in zip((dk, dv), sums):
        if total is not room:
            room.copy_(total)
    return dq, dk, dv


def _is_whole(cut: Sequence[Piece]) -> bool:
    """Return whether one call of a vendor computes the whole context."""
    return len(cut) == 1 and cut[0].samples == cut[0].queries == cut[0].keys == ALL


def _shifted(lse: Tensor, lse_rest: Tensor, shift: float | Tensor) -> Tensor:
    """Return a log-sum-exp in the scores that a vendor sees; +inf for a query that sees nothing: exp(s - lse) is 0."""
    if lse_rest.numel():
        lse = lse - shift + lse_rest
    return lse.masked_fill(lse.isneginf(), torch.inf)


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


class _Part(NamedTuple):
    """A piece of a call."""

    piece: Piece
    x: Attention  # a vendor's input
    shift: float | Tensor  # [b, Hq, n], subtracted from its queries' masks
    hides: bool  # whether its mask may hide keys


def _parts(call: PrefixAttentionCall, cut: Sequence[Piece]) -> Iterator[_Part]:
    """Yield each piece with its masks."""
    masks = Masks(call)
    N, M = call.query.shape[2], call.key.shape[2]
    common: Tensor | None = None
    if masks.move and any(piece.again for piece in cut):  # all have all queries, whose shifts must be the same
        common = shift_of(under_causality(sum(masks.additive[1:], masks.additive[0]), N, M))
    query, key, value = (
        x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (call.query, call.key, call.value)
    )
    for piece in cut:
        q, k, v = piece.rows(query), piece.of_keys(key), piece.of_keys(value)
        those = slice(0 if piece.is_padded else 1, None)  # padding is the first mask
        mask = piece.mask(masks.additive[those], q)
        shift = common if common is None or len(common) == 1 else common[piece.samples]
        if masks.move:
            assert mask is not None
            if shift is None:
                mask = under_causality(mask, q.shape[2], k.shape[2]) if piece.is_causal else mask
                shift = shift_of(mask)
            mask = mask - shift
        x = Attention(q, k, v, mask, piece.is_causal, call.scale, piece.window)
        yield _Part(piece, x, 0.0 if shift is None else shift.squeeze(-1), piece.has_band or any(masks.hide[those]))


def _seen(part: _Part, vendor: Vendor) -> tuple[Tensor, Tensor]:
    """Return a vendor's output and log-sum-exp, set to 0 and -inf for queries that see nothing."""
    x = part.x
    output, lse = vendor.forward(x)
    if x.mask is None or not part.hides:
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
