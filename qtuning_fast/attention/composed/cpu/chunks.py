"""Chunks: stacked queries of a call, so few that their scores stay in the processor's cache."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import score_dtype
from qtuning_fast.attention.packed import spans
from qtuning_fast.attention.reference import bank_index

SCORES = 1 << 19  # about as many scores, or elements of queries, in a chunk: 2 MiB in float32
LEAST_ROWS = 64  # products over fewer rows are slow


@dataclass(frozen=True)
class Chunk:
    """Queries of neighbouring samples that share a prefix: some of one sample, or all of several.

    Packed sequences are positions of one sample.
    """

    call: PrefixAttentionCall
    prefix: int
    length: int  # rows of the prefix
    samples: slice
    positions: slice
    sequence: int = 0  # whose bias it is, if each packed sequence has its own

    def part(self, x: Tensor) -> Tensor:
        """Return the chunk's part of x [B, Hq, N, D] as a view [Hkv, b, G, n, D]."""
        group = self.call.query.shape[1] // self.call.key.shape[1]
        return x[self.samples, :, self.positions].unflatten(1, (-1, group)).transpose(0, 1)

    def read(self, x: Tensor) -> Tensor:
        """Return the chunk's part of x [B, Hq, N, D] as [Hkv, rows, D] in the scores' dtype, a view if possible."""
        return self.stacked(x).to(score_dtype(self.call.query))

    def stacked(self, x: Tensor) -> Tensor:
        """Return the same as `read`, in x's own dtype."""
        return self.part(x).flatten(1, 3)

    def apart(self, stacked: Tensor) -> Tensor:
        """Reshape [Hkv, rows, D] to the shape of `part`."""
        return stacked.unflatten(1, self._shape[1:])

    def scores(self, name: str) -> Tensor:
        """Return scratch memory [Hkv, P, rows]."""
        Hkv, *rows = self._shape
        return scratch(name, score_dtype(self.call.query), Hkv, self.length, math.prod(rows))

    def room(self, name: str, like: Tensor) -> Tensor:
        """Return scratch memory [Hkv, rows, D] with like's D."""
        Hkv, *rows = self._shape
        return scratch(name, like.dtype, Hkv, math.prod(rows), like.shape[-1])

    def bias(self, bias: Tensor) -> Tensor:
        """Return the chunk's part of a bias on the prefix, [Hkv, rows, P]."""
        if self.call.is_packed and len(bias) > 1:
            bias = bias[self.sequence, None]
        return self.stacked(bias.expand(*self.call.query.shape[:3], -1)[..., : self.length])

    def by_head(self, x: Tensor) -> Tensor:
        """Sum [Hkv, rows] over samples and positions to [Hq]."""
        return self.apart(x).sum((1, 3)).flatten()

    def gate_parameter(self, parameter: float | Tensor) -> Tensor:
        """Return alpha or tau in a shape that broadcasts with scores [Hkv, P, rows]."""
        parameter = torch.as_tensor(parameter, dtype=score_dtype(self.call.query), device="cpu")
        if parameter.ndim == 2:
            parameter = parameter[self.prefix]
        if parameter.numel() == 1 or len(parameter) == self.call.key.shape[1]:
            return parameter.reshape(-1, 1, 1)
        return self.read(parameter[:, None, None].expand(*self.call.query.shape[:3], 1)).mT

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        """The sizes Hkv, samples, G, positions."""
        Hq, Hkv = self.call.query.shape[1], self.call.key.shape[1]
        return Hkv, self.samples.stop - self.samples.start, Hq // Hkv, self.positions.stop - self.positions.start


def chunks(call: PrefixAttentionCall) -> Iterator[Chunk]:
    """Yield all queries that have a prefix, always in the same order."""
    N = call.query.shape[2]
    if not (N and call.prefix_key.shape[-2]):
        return
    queries = largest_chunk(call)
    if call.is_packed:
        yield from _chunks_of_sequences(call, queries)
        return
    for prefix, length, samples in _runs(call):
        if N > queries:
            for sample, positions in itertools.product(samples, _cut(range(N), queries)):
                yield Chunk(call, prefix, length, slice(sample, sample + 1), positions)
        else:
            for several in _cut(samples, queries // N):
                yield Chunk(call, prefix, length, several, slice(0, N))


def _chunks_of_sequences(call: PrefixAttentionCall, queries: int) -> Iterator[Chunk]:
    """Yield packed sequences; neighbours with the same prefix and bias are one run of positions."""
    rows = [span.queries for span in spans(call)]
    own_bias = call.prefix_bias is not None and len(call.prefix_bias) > 1
    for prefix, length, sequences in _runs(call, own_bias=own_bias):
        positions = range(rows[sequences[0]].start, rows[sequences[-1]].stop)
        for part in _cut(positions, queries) if positions else ():
            yield Chunk(call, prefix, length, slice(0, 1), part, sequences[0])


def largest_chunk(call: PrefixAttentionCall) -> int:
    """Return the most queries of one head in a chunk, over one sample or several."""
    Hq, Hkv = call.query.shape[1], call.key.shape[1]
    columns = max(call.prefix_key.shape[-2], call.query.shape[-1], call.value.shape[-1])
    rows = max(SCORES // max(Hkv * columns, 1), LEAST_ROWS)
    return max(rows * Hkv // Hq, 1)


def _runs(call: PrefixAttentionCall, *, own_bias: bool = False) -> Iterator[tuple[int, int, range]]:
    """Yield runs of neighbouring samples with the same non-empty prefix: its index, its length, the samples.

    Args:
        own_bias: whether each has its own bias, so that it is a run by itself.
    """
    P, (count, _, _) = call.prefix_key.shape[-2], call.counts
    index = [0] * count if call.prefix_index is None else bank_index(call).tolist()
    start = 0
    for (prefix, _), run in itertools.groupby((prefix, i if own_bias else 0) for i, prefix in enumerate(index)):
        samples = range(start, start := start + len(list(run)))
        length = P if call.prefix_length is None else min(max(int(call.prefix_length[prefix]), 0), P)
        if length:
            yield prefix, length, samples


def _cut(x: range, largest: int) -> list[slice]:
    """Cut a range into as few slices as possible, of about equal size."""
    pieces = -(-len(x) // largest)
    ends = [x.start + len(x) * i // pieces for i in range(pieces + 1)]
    return [slice(*ends) for ends in itertools.pairwise(ends)]


class Scratch(threading.local):
    """Memory kept from call to call, as much as the largest chunk so far needed.

    PyTorch returns freed memory to the system, which hands it out again page by page. For a chunk's tensors that took
    longer than their arithmetic.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return memory of this shape; the previous content under that name is lost."""
        size = math.prod(shape)
        room = self._kept.get((name, dtype))
        if room is None or room.numel() < size:
            with torch.inference_mode(False):  # inference tensors cannot be written outside that mode
                room = self._kept[name, dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return room[:size].view(shape)


scratch = Scratch()
