"""How the context is cut into pieces, each of which a vendor computes as plain attention.

Causality, aligned bottom-right, is cut into what is square and what all queries see. A window is cut into chunks of
queries, each with the keys within its reach, so that cost grows with the window and nothing dense is built. Chunks
whose reach lies within the context have equally many keys and form the batch of one call, through views that overlap.
Packed sequences are cut one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import score_dtype
from qtuning_fast.attention.composed.vendors import Vendor
from qtuning_fast.attention.packed import Span, sequences

ALL = slice(None)
LARGEST_CHUNK = 256  # queries; PyTorch's flash attention for CPUs takes as many at a time
SMALLEST_CHUNK = 32
MOST_ELEMENTS = 1 << 20  # of keys in the chunks of one call: 4 MiB in float32, so that gradients stay in the cache


class Piece(NamedTuple):
    """Some queries of some samples that attend to some keys. Those that share no piece do not see each other.

    With a `chunk`, queries come in chunks of that many, each with its own keys: the first `width` of the piece's keys
    for the first, and the next chunk's begin `chunk` keys later.

    Attributes:
        is_causal: aligned bottom-right.
        again: whether an earlier piece has the same queries, with other keys.
        band: key j is seen by query i, both counted from a chunk's first, if j - i lies within these bounds; None: no
            bound.
        is_padded: whether a padding mask may hide keys of the piece.
        window: that of the call, for a vendor that takes it.
    """

    samples: slice = ALL
    queries: slice = ALL
    keys: slice = ALL
    is_causal: bool = False
    again: bool = False
    band: tuple[int | None, int | None] = (None, None)
    chunk: int = 0
    width: int = 0
    is_padded: bool = True
    window: tuple[int | None, int | None] = (None, None)

    def rows(self, x: Tensor) -> Tensor:
        """Return a view of the piece's rows of x [B, H, N, D]: [b, H, n, D], with chunks [chunks, H, chunk, D]."""
        part = x[self.samples, :, self.queries]
        return part[0].unflatten(1, (-1, self.chunk)).transpose(0, 1) if self.chunk else part

    def of_queries(self, x: Tensor) -> Tensor:
        """Return the same view of x [B, H, N]."""
        return self.rows(x[..., None])[..., 0]

    def of_keys(self, x: Tensor) -> Tensor:
        """Return a view of the piece's keys in x [B, H, M, D], [b, H, m, D]; those of chunks overlap."""
        part = x[self.samples, :, self.keys]
        return part[0].unfold(1, self.width, self.chunk).permute(1, 0, 3, 2) if self.chunk else part

    def add_to_keys(self, room: Tensor, gradient: Tensor) -> None:
        """Add a gradient of `of_keys` to that of all keys, room [B, H, M, D]."""
        part = room[self.samples, :, self.keys]
        if not self.chunk:
            part += gradient
            return
        chunks = len(gradient)
        for start in range(0, self.width, self.chunk):  # strips of the chunks' keys that do not overlap
            strip = gradient[:, :, start : start + self.chunk].transpose(0, 1)  # [H, chunks, n, D]
            keys = part[0].narrow(1, start, (chunks - 1) * self.chunk + strip.shape[2])
            keys.unfold(1, strip.shape[2], self.chunk).transpose(2, 3).add_(strip)

    def of_sequence(self, span: Span) -> Piece:
        """Return a piece of one packed sequence as a piece of all."""
        return self._replace(queries=_within(self.queries, span.queries), keys=_within(self.keys, span.keys))

    @property
    def has_band(self) -> bool:
        return self.band != (None, None)

    def mask(self, given: Sequence[Tensor], query: Tensor) -> Tensor | None:
        """Return the additive mask of the piece; None: all is seen.

        Args:
            given: additive masks [B, Hq, N, M], any dimension may be 1.
            query: one of the mask's device; without given masks its scores' dtype is the mask's.
        """
        parts = [self._part_of(mask) for mask in given]
        mask = sum(parts[1:], parts[0]) if parts else None
        if not self.has_band:
            return mask
        low, high = self.band
        n, m = self.chunk or _length(self.queries), self.width or _length(self.keys)
        hidden = torch.zeros(1, 1, n, m, dtype=torch.bool, device=query.device)
        hidden = hidden if low is None else hidden.logical_or_(torch.ones_like(hidden).tril(low - 1))
        hidden = hidden if high is None else hidden.logical_or_(torch.ones_like(hidden).triu(high + 1))
        mask = torch.zeros(1, 1, n, m, dtype=score_dtype(query), device=query.device) if mask is None else mask
        return mask.masked_fill(hidden, -torch.inf)

    def _part_of(self, mask: Tensor) -> Tensor:
        by_sample, by_query, by_key = (size > 1 for size in (mask.shape[0], *mask.shape[2:]))
        mask = mask[self.samples if by_sample else ALL, :, self.queries if by_query else ALL]
        mask = mask[..., self.keys if by_key else ALL]
        if not self.chunk:
            return mask
        if by_query:
            mask = mask.unflatten(2, (-1, self.chunk))  # [1, h, chunks, chunk, keys]
        if by_key:
            mask = mask.unfold(-1, self.width, self.chunk)  # [..., chunks, width]
        if by_query and by_key:
            mask = mask.diagonal(dim1=2, dim2=4).movedim(-1, 2)  # each chunk of queries with its own keys
        elif by_key:
            mask = mask.transpose(2, 3)
        return mask[0].transpose(0, 1) if by_query or by_key else mask


def pieces(call: PrefixAttentionCall, vendor: Vendor) -> Sequence[Piece]:
    """Split the context into disjoint pieces that cover what is seen."""
    if call.is_packed:
        return [piece.of_sequence(span) for span, alone in sequences(call) for piece in _pieces(alone, vendor)]
    found = _pieces(call, vendor)
    return list(_by_sample(call, found)) if found and call.query.is_cpu and _shares_a_mask(call) else found


def _shares_a_mask(call: PrefixAttentionCall) -> bool:
    """Return whether samples share an attention mask beside padding of their own, which would repeat it for each."""
    padding, mask = call.padding_mask, call.attn_mask
    if padding is None or mask is None or padding.dtype != torch.bool:
        return False
    return len(padding) > 1 and (len(mask) == 1 or mask.stride(0) == 0) and mask.shape[2] > 1


def _by_sample(call: PrefixAttentionCall, found: Sequence[Piece]) -> Iterator[Piece]:
    """Cut pieces into samples, and keys that are padding off a sample's end."""
    assert call.padding_mask is not None
    attended = call.padding_mask
    last = (attended * torch.arange(1, call.key.shape[2] + 1)).amax(1)
    ends, whole = last.tolist(), (attended.sum(1) == last).tolist()
    for piece in found:
        if piece.samples != ALL:
            yield piece
            continue
        for sample, (end, is_whole) in enumerate(zip(ends, whole)):
            own = piece._replace(samples=slice(sample, sample + 1))
            if piece.keys == ALL and not piece.is_causal:
                own = own._replace(keys=slice(0, end), is_padded=not is_whole)
            if own.keys != slice(0, 0):
                yield own


def _pieces(call: PrefixAttentionCall, vendor: Vendor) -> Sequence[Piece]:
    N, M = call.query.shape[2], call.key.shape[2]
    before, after = call.keys_before, call.keys_after
    if 0 in call.query.shape or M == 0:
        return ()
    if N == 1:
        keys = _reached(M, M - 1, M - 1, before, after)
        return (Piece(keys=ALL if keys == slice(0, M) else keys),)
    if before is None and after is None:
        return (Piece(),)
    if before is not None or after != 0:
        return (Piece(window=(before, after)),) if vendor.windows else list(_windows(call))
    if N == M or (N < M and vendor.bottom_right):
        return (Piece(is_causal=True),)
    if N < M:  # all queries see the first M - N keys
        return (Piece(keys=slice(M - N)), Piece(keys=slice(M - N, None), is_causal=True, again=True))
    return (Piece(queries=slice(N - M, None), is_causal=True),)  # the first N - M queries see none


def _windows(call: PrefixAttentionCall) -> Iterator[Piece]:
    """Cut a window; no two pieces have queries in common."""
    B, N, M = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    before, after = call.keys_before, call.keys_after
    offset = M - N  # of a query's position
    first = 0 if after is None else min(max(-offset - after, 0), N)  # queries before it see nothing
    if before is None or after is None:
        yield from _clipped(call, first, N, LARGEST_CHUNK)
        return
    chunk = min(max(SMALLEST_CHUNK, (before + after) // 4), LARGEST_CHUNK)
    begin = min(max(before - offset, first), N)  # the first query whose reach begins within the context
    chunks = max(N - after - begin, 0) // chunk  # whose reach ends within it, too
    end = begin + chunks * chunk
    if begin:
        yield from _clipped(call, first, begin, chunk)
    width = chunk + before + after
    together = max(MOST_ELEMENTS // (width * call.key.shape[1] * call.key.shape[3]), 1) * chunk
    for sample in range(B):
        for start in range(begin, end, together):
            stop = min(start + together, end)
            keys = slice(start + offset - before, stop + offset + after)
            band = (0, before + after)
            yield Piece(slice(sample, sample + 1), slice(start, stop), keys, band=band, chunk=chunk, width=width)
    yield from _clipped(call, end, N, chunk)


def _clipped(call: PrefixAttentionCall, start: int, stop: int, chunk: int) -> Iterator[Piece]:
    """Cut the queries start..stop into chunks that see keys up to the context's first or last."""
    N, M = call.query.shape[2], call.key.shape[2]
    before, after = call.keys_before, call.keys_after
    for begin in range(start, stop, chunk):
        end = min(begin + chunk, stop)
        position = begin + M - N
        keys = _reached(M, position, position + end - begin - 1, before, after)
        shift = position - keys.start  # of the first query from the first key
        low = None if before is None or shift + end - begin - 1 <= before else shift - before
        high = None if after is None or keys.stop - 1 <= position + after else shift + after
        if keys.start < keys.stop:
            yield Piece(queries=slice(begin, end), keys=keys, band=(low, high))


def _reached(M: int, first: int, last: int, before: int | None, after: int | None) -> slice:
    """Return the keys that queries at the positions first..last see, together."""
    start = 0 if before is None else min(max(first - before, 0), M)
    return slice(start, M if after is None else max(min(last + after + 1, M), start))


def _within(part: slice, whole: slice) -> slice:
    """Return a part of a slice, counted from the whole's beginning, as a slice of what the whole is of."""
    stop = whole.stop if part.stop is None else whole.start + part.stop
    return slice(whole.start + (part.start or 0), stop)


def _length(part: slice) -> int:
    return int(part.stop) - int(part.start)
