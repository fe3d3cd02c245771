"""The context part of the composed backend: attention by a vendor, in pieces that the vendor computes correctly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import score_dtype
from qtuning_fast.attention.composed.pieces import ALL, Piece, pieces
from qtuning_fast.attention.composed.vendors import Attention, Vendor

NEAR = 256.0  # additive masks up to this magnitude are not shifted


def forward(call: PrefixAttentionCall, vendor: Vendor, keeps_rest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute attention over the context alone.

    Returns:
        Output, log-sum-exp and the latter's rest, to be added to it, shaped as in `empty_outputs`. A query that sees
        nothing gets 0 and -inf. Masks and causality decide which queries these are, because vendors' reports differ.
    """
    parts = pieces(call, vendor)
    shift: float | Tensor = 0.0
    if _is_whole(parts):
        _, x, shift = next(_attentions(call, parts))
        o, L = _seen(x, vendor)
        like, like_lse, _ = empty_outputs(call, vendor, keeps_rest, device="meta")
        output, lse = _laid_out(o, like), _laid_out(L, like_lse)
    else:
        output, lse, _ = empty_outputs(call, vendor, keeps_rest)
        output.zero_()
        lse.fill_(-torch.inf)
        for piece, x, own in _attentions(call, parts):
            o, L = _seen(x, vendor)
            if piece.again:
                _merge(piece.rows(output), piece.of_queries(lse), o, L)
            else:
                piece.rows(output).copy_(o)
                piece.of_queries(lse).copy_(L)
            if isinstance(own, Tensor):
                shift = shift if isinstance(shift, Tensor) else torch.zeros_like(lse)
                piece.of_queries(shift).copy_(own)
    if not keeps_rest:
        return output, lse, lse.new_empty(0)
    total = lse + shift
    return output, total, (shift - total + lse).nan_to_num_(0.0)


def backward(
    call: PrefixAttentionCall, vendor: Vendor, output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the context's gradients of query, key and value, given the global output and log-sum-exp."""
    parts = pieces(call, vendor)
    d_output = _laid_out(d_output, output)
    if _is_whole(parts):
        _, x, shift = next(_attentions(call, parts))
        found = vendor.backward(x, output, _shifted(lse, lse_rest, shift), d_output)
        dq, dk, dv = (_laid_out(x, room) for x, room in zip(found, empty_gradients(call, vendor, device="meta")))
        return dq, dk, dv
    dq, dk, dv = (room.zero_() for room in empty_gradients(call, vendor))
    for piece, x, own in _attentions(call, parts):
        rest = piece.of_queries(lse_rest) if lse_rest.numel() else lse_rest
        L = _shifted(piece.of_queries(lse), rest, own)
        found = vendor.backward(x, piece.rows(output), L, piece.rows(d_output))
        rows = piece.rows(dq)
        rows += found[0]
        piece.add_to_keys(dk, found[1])
        piece.add_to_keys(dv, found[2])
    return dq, dk, dv


def _is_whole(parts: Sequence[Piece]) -> bool:
    """Return whether one call of a vendor computes the whole context."""
    return len(parts) == 1 and parts[0].samples == parts[0].queries == parts[0].keys == ALL


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


def _attentions(call: PrefixAttentionCall, parts: Sequence[Piece]) -> Iterator[tuple[Piece, Attention, float | Tensor]]:
    """Yield each piece, a vendor's input for it, and the shift, [b, Hq, n], subtracted from its queries' masks.

    Subtracting a number from all scores of a query does not change attention. The shift is the largest additive mask
    value that the query sees, which keeps its log-sum-exp near its scores however far the mask's values are from 0.
    """
    padding = None if call.padding_mask is None else call.padding_mask[:, None, None, :]
    masks = [_narrowed(mask) for mask in (padding, call.attn_mask) if mask is not None]
    moves = any(mask.dtype != torch.bool for mask in masks) and 0 not in call.query.shape
    common: Tensor | None = None
    if moves and any(piece.again for piece in parts):  # all have all queries, whose shifts must be the same
        whole = Piece().mask(masks, call)
        assert whole is not None
        common = _largest(_causal(whole, call.query.shape[2], call.key.shape[2]))
    query, key, value = (
        x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (call.query, call.key, call.value)
    )
    for piece in parts:
        x = Attention(
            *(piece.rows(query), piece.of_keys(key), piece.of_keys(value), piece.mask(masks, call), piece.is_causal),
            call.scale,
        )
        shift: float | Tensor = 0.0
        if moves:
            mask = x.mask
            assert mask is not None
            if common is not None:
                largest, mask = common, mask - common
            else:
                mask = _causal(mask, x.query.shape[2], x.key.shape[2]) if piece.is_causal else mask
                largest = _largest(mask)
                mask.sub_(largest)
            x, shift = x._replace(mask=mask), largest.squeeze(-1)
        yield piece, x, shift


def _causal(mask: Tensor, N: int, M: int) -> Tensor:
    """Return an additive mask with -inf where causality hides a key.

    Under causality queries see different keys, so a row shared by all queries is expanded to one row a query.
    """
    if mask.shape[3] != M:
        return mask
    return mask.masked_fill(torch.ones(N, M, dtype=torch.bool, device=mask.device).triu(M - N + 1), -torch.inf)


def _largest(mask: Tensor) -> Tensor:
    """Return the largest number of each row of an additive mask that is not near 0 anyway; of others 0."""
    largest = mask.amax(-1, keepdim=True)
    return largest.masked_fill(largest.isinf() | (largest.abs() <= NEAR), 0)


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
