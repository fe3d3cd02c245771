"""How the context is cut: each query with each key that it sees in one piece, and nothing dense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qtuning_fast.attention.composed import pieces as module
from qtuning_fast.attention.composed.pieces import pieces
from qtuning_fast.attention.composed.vendors import vendor_for
from qtuning_fast.attention.reference import within_reach


@pytest.mark.parametrize(
    ("N", "M", "expected"),
    [
        (0, 5, []),
        (5, 0, []),
        (1, 5, [(1, 5, False)]),
        (5, 5, [(5, 5, True)]),
        (3, 5, [(3, 2, False), (3, 3, True)]),
        (5, 3, [(3, 3, True)]),
    ],
)
def test_causality_bottom_right_in_pieces_that_are_square(make_call, call_of, N, M, expected):
    call = call_of(make_call(N=N, M=M, is_causal=True))
    found = pieces(call, vendor_for(call))
    sizes = [(len(range(N)[p.queries]), len(range(M)[p.keys]), p.is_causal) for p in found]
    assert sizes == expected


def covered(call, parts):
    """How often a query and a key meet unmasked, [B, N, M]."""
    B, N, M = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    pairs = torch.arange(B * N * M).view(B, N, M)
    times = torch.zeros(B * N * M, dtype=torch.int64)
    numbers = torch.arange(M).expand(B, 1, M)[..., None]  # [B, 1, M, 1]
    for piece in parts:
        queries = piece.rows(torch.arange(N).expand(B, 1, N)[..., None])[:, 0, :, 0]
        keys = piece.of_keys(numbers)[:, 0, :, 0]
        samples = range(B)[piece.samples] if piece.chunk == 0 else [range(B)[piece.samples][0]] * len(queries)
        mask = piece.mask([], call.query)
        for b, rows, columns in zip(samples, queries, keys, strict=True):
            seen = torch.ones(len(rows), len(columns), dtype=torch.bool)
            if mask is not None:
                seen = mask[0, 0] == 0
            if piece.is_causal:
                seen = seen.tril(len(columns) - len(rows))
            met = pairs[b][rows][:, columns][seen]
            times.index_add_(0, met, torch.ones_like(met))
    return times.view(B, N, M)


sizes = st.integers(1, 90)
bounds = st.none() | st.integers(0, 40)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(B=st.integers(1, 3), N=sizes, M=sizes, window=st.tuples(bounds, bounds), is_causal=st.booleans())
@example(B=2, N=90, M=90, window=(5, 0), is_causal=False)
def test_each_query_meets_each_key_that_it_sees_once_and_no_other(make_call, call_of, B, N, M, window, is_causal):
    call = call_of(make_call(B=B, N=N, M=M, window=window, is_causal=is_causal))
    found = covered(call, pieces(call, vendor_for(call)))
    expected = within_reach(call)
    expected = torch.ones(N, M, dtype=torch.bool) if expected is None else expected
    assert torch.equal(found, expected.long().expand(B, N, M))


def test_a_window_costs_what_it_sees(make_call, call_of):
    call = call_of(make_call(B=1, Hkv=1, G=1, N=8192, M=8192, window=(64, 64)))
    parts = pieces(call, vendor_for(call))
    scores = sum(piece.rows(call.query).shape[0] * piece.mask([], call.query).numel() for piece in parts)
    assert len(parts) <= 6 and scores < 1.3 * 129 * 8192


def test_masks_are_cut_as_queries_and_keys_are(make_call, call_of, monkeypatch):
    """Every kind of mask, of one row or of many, over the chunks of a window."""
    monkeypatch.setattr(module, "SMALLEST_CHUNK", 4)
    monkeypatch.setattr(module, "LARGEST_CHUNK", 8)
    call = call_of(make_call(B=2, Hkv=1, G=2, N=50, M=57, window=(6, 3)))
    chunked = [piece for piece in pieces(call, vendor_for(call)) if piece.chunk]
    assert len(chunked) == 2
    for shape in ((2, 1, 1, 57), (1, 2, 50, 57), (2, 1, 50, 57), (1, 1, 50, 1), (1, 1, 1, 1), (2, 2, 50, 57)):
        mask = torch.randn(shape, dtype=torch.float64)
        whole = mask.expand(2, 2, 50, 57)
        for piece in chunked:
            found = piece._part_of(mask)
            queries = piece.rows(torch.arange(50).expand(2, 1, 50)[..., None])[:, 0, :, 0]
            keys = piece.of_keys(torch.arange(57).expand(2, 1, 57)[..., None])[:, 0, :, 0]
            sample = piece.samples.start
            for chunk, (rows, columns) in enumerate(zip(queries, keys, strict=True)):
                expected = whole[sample][:, rows][:, :, columns]
                part = found[chunk if len(found) > 1 else 0].expand_as(expected)
                assert torch.equal(part, expected), shape


def test_gradients_of_overlapping_keys_add_up(make_call, call_of):
    call = call_of(make_call(B=2, Hkv=2, N=90, M=90, window=(5, 4)))
    piece = next(piece for piece in pieces(call, vendor_for(call)) if piece.chunk)
    keys = torch.randn(2, 2, 90, 3, dtype=torch.float64, requires_grad=True)
    of_keys = piece.of_keys(keys)
    gradient = torch.randn(of_keys.shape, dtype=torch.float64)
    room = torch.zeros_like(keys)
    with torch.no_grad():
        piece.add_to_keys(room, gradient)
    torch.testing.assert_close(room, torch.autograd.grad(of_keys, keys, gradient)[0], rtol=0, atol=1e-14)
