"""Tiles: which rows and scores are read and written, what masks hide, and the log-sum-exp between two passes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from qtuning_fast.kernels import arguments
from qtuning_fast.kernels.arguments import PerQuery
from qtuning_fast.kernels.launch import Variant
from qtuning_fast.kernels.target import INTERPRETED
from qtuning_fast.kernels.tiles import (
    context_range,
    length_of,
    load_lse,
    load_rows,
    masked,
    next_prefix,
    query_rows,
    query_tile,
    span_of,
    stacked_rows,
    store_lse,
    store_rows,
    weight_rows,
    within_bank,
)

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BASE = {"dtype": torch.float32, "B": 2, "Hkv": 2, "G": 2, "N": 20, "M": 7, "P": 5, "D": 16, "Dv": 16}


def variant(**changes):
    known = {"HAS_MASK": False, "PRECISION": "ieee", "EXACT": True}
    return Variant(**known | {"BLOCK_N": 16, "BLOCK_M": 16, "BLOCK_P": 16} | changes).marked()


@triton.jit
def copy_kernel(source, target, outer, head, start, end, BLOCK: tl.constexpr):
    store_rows(target, outer, head, start, end, load_rows(source, outer, head, start, end, BLOCK), BLOCK)


@pytest.mark.parametrize(("start", "end"), [(0, 5), (3, 16), (8, 21), (20, 20)])
@pytest.mark.parametrize("D", [16, 24])
def test_rows_are_copied_from_start_to_end_and_no_others(start, end, D):
    x = torch.randn(2, 21, 3, D).transpose(1, 2)
    room = torch.full_like(x, torch.nan)
    copy_kernel[(1,)](arguments.rows(x), arguments.written_rows(room), 1, 2, start, end, 16)
    last = min(end, start + 16)
    assert torch.equal(room[1, 2, start:last], x[1, 2, start:last])
    room[1, 2, start:last] = torch.nan
    assert room.isnan().all()


@triton.jit
def masked_kernel(scores, mask, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, masked(tl.load(scores + i), tl.load(mask + i)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_infinity_and_the_most_negative_number_hide_and_the_next_one_does_not(dtype):
    least = torch.finfo(dtype).min
    numbers = torch.tensor([0.0, -torch.inf, least, least / 2, 1.5, -3.0, 0.0, -1e4], dtype=dtype)
    scores = torch.arange(8, dtype=torch.float32)
    out = torch.empty_like(scores)
    masked_kernel[(1,)](scores, numbers, out, 8)
    hidden = [False, True, True, dtype == torch.float64, False, False, False, False]  # float32 holds no such number
    assert out.isneginf().tolist() == hidden
    torch.testing.assert_close(out[[0, 4, 5, 6, 7]], (scores + numbers.float())[[0, 4, 5, 6, 7]])


def test_false_hides():
    scores = torch.arange(8, dtype=torch.float32)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.uint8)
    out = torch.empty_like(scores)
    masked_kernel[(1,)](scores, mask, out, 8)
    assert torch.equal(out, scores.masked_fill(mask == 0, -torch.inf))


@triton.jit
def lse_kernel(per_query, sums, found, sizes, variant):
    start, row, exists = query_rows(sizes, span_of(sizes, 0), 0, 0, variant)
    m = tl.load(sums + row, mask=exists, other=0.0)
    l = tl.load(sums + sizes.N + row, mask=exists, other=0.0)
    store_lse(per_query, start, row, exists, m, l, 0.0, variant)
    L, rest = load_lse(per_query, start, row, exists, variant)
    tl.store(found + row, L)
    tl.store(found + variant.BLOCK_N + row, rest)


@pytest.mark.parametrize("exact", [True, False])
def test_a_log_sum_exp_is_read_as_it_was_written(exact):
    """Natural with its rest, or in powers of 2; +inf for a query that saw nothing, and for one that is not there."""
    N = 5
    m = torch.tensor([0.3, -1e9, 1e9, -torch.inf, 12.0] if exact else [0.3, -40.0, 90.0, -torch.inf, 12.0])
    l = torch.tensor([1.0, 3.0, 7.0, 0.0, 2.0])
    lse, rest = torch.full((N,), torch.nan), torch.full((N if exact else 0,), torch.nan)
    found = torch.full((2, 16), torch.nan)
    sizes = arguments.Sizes(B=1, N=N, M=1, heads=1, group=1)
    lse_kernel[(1,)](PerQuery(lse, rest, None), torch.stack([m, l]), found, sizes, variant(EXACT=exact))
    natural = 1.0 if exact else torch.log(torch.tensor(2.0)).item()
    expected = (m * natural).double() + l.double().log()
    assert lse[3].isneginf() and (found[0, [3, *range(N, 16)]] == torch.inf).all() and (found[1, 3:4] == 0).all()
    seen = [0, 1, 2, 4]
    written = lse.double() + (rest.double() if exact else 0)
    torch.testing.assert_close(written[seen], expected[seen], rtol=1e-6, atol=1e-6)
    L = found[0, :N].double() * natural + found[1, :N].double()
    torch.testing.assert_close(L[seen], expected[seen], rtol=1e-6, atol=1e-6)
    if exact:  # -1e9 + log 3 in one float would lose the logarithm
        torch.testing.assert_close(
            (found[1, 1] + (found[0, 1] + 1e9)).item(), torch.log(l[1]).item(), rtol=1e-5, atol=0
        )


@triton.jit
def range_kernel(out, sizes, n, variant):
    start, first, whole, end = context_range(sizes, span_of(sizes, 0), n, variant)
    tl.store(out, start)
    tl.store(out + 1, first)
    tl.store(out + 2, whole)
    tl.store(out + 3, end)


CAUSAL = {"after": arguments.constant(0)}


@pytest.mark.parametrize(
    ("N", "M", "n", "reach", "masked", "expected"),
    [
        (40, 50, 16, {}, False, (0, 0, 48, 50)),
        (40, 50, 16, {}, True, (0, 0, 0, 50)),
        (40, 50, 16, CAUSAL, False, (0, 0, 16, 42)),  # query 16 sees 27 keys, query 31 sees 42
        (40, 10, 16, CAUSAL, False, (0, 0, 0, 2)),  # query 30 is the first that sees one
        (40, 10, 0, CAUSAL, False, (0, 0, 0, 0)),
        (40, 50, 32, CAUSAL, True, (0, 0, 0, 50)),
        (40, 50, 0, {"after": 5}, False, (0, 0, 16, 31)),  # query 0 stands at 10
        (200, 200, 96, {"before": 50}, False, (32, 64, 192, 200)),  # queries 96 to 111 see keys from 46, 61
        (200, 200, 96, {"before": 50, "after": 20}, False, (32, 64, 112, 132)),
        (200, 200, 96, {"before": 50, "after": 20}, True, (32, 32, 32, 132)),
        (200, 200, 96, {"before": 3, "after": 2}, False, (80, 112, 112, 114)),  # none is seen by all
        (200, 200, 0, {"before": 50, "after": 20}, False, (0, 0, 16, 36)),
        (200, 20, 0, {"before": 50, "after": 20}, False, (0, 0, 0, 0)),  # they stand before the first key
    ],
)
def test_keys_that_need_no_mask_and_keys_that_no_query_sees(N, M, n, reach, masked, expected):
    out = torch.zeros(4, dtype=torch.int32)
    range_kernel[(1,)](out, arguments.Sizes(1, N, M, 1, 1, **reach), n, variant(HAS_MASK=masked))
    assert tuple(out.tolist()) == expected


@triton.jit
def span_kernel(out, sizes):
    b = tl.program_id(0)
    span = span_of(sizes, b)
    tl.store(out + b * 4, span.N)
    tl.store(out + b * 4 + 1, span.M)
    tl.store(out + b * 4 + 2, span.queries)
    tl.store(out + b * 4 + 3, span.keys)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([0, 3, 3, 9], [(3, 0), (0, 3), (6, 3)]),
        ([-4, 3, 50, 60], [(3, 0), (8, 3), (0, 12)]),  # unchecked, and cut to the 12 rows and to the longest's 8
        ([5, 2, 12, 1], [(0, 5), (8, 2), (0, 12)]),
    ],
)
def test_the_rows_of_a_packed_sequence(ends, expected):
    offsets, keys = torch.tensor(ends, dtype=torch.int32), torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    out = torch.full((3, 4), -1, dtype=torch.int32)
    packed = {"query_offsets": offsets, "key_offsets": keys, "queries": 12, "keys": 3}
    span_kernel[(3,)](out, arguments.Sizes(3, 8, 2, heads=1, group=1, **packed))
    assert out.tolist() == [[N, 1, first, s] for s, (N, first) in enumerate(expected)]
    span_kernel[(3,)](out, arguments.Sizes(3, 8, 2, heads=1, group=1))
    assert out.tolist() == [[8, 2, b, b] for b in range(3)]


@triton.jit
def query_tile_kernel(out, sizes, variant):
    b, h, n = query_tile(sizes, variant)
    first = out + tl.program_id(0) * 3
    tl.store(first, b)
    tl.store(first + 1, h)
    tl.store(first + 2, n)


def test_each_tile_of_queries_is_one_programs_the_last_of_a_head_first():
    out = torch.full((12, 3), -1, dtype=torch.int32)
    query_tile_kernel[(12,)](out, arguments.Sizes(B=2, N=20, M=1, heads=3, group=1), variant())
    assert out.tolist() == [[b, h, n] for b in range(2) for h in range(3) for n in (16, 0)]


@triton.jit
def stacked_kernel(out, sizes, order, variant):
    hk, b, h, n, exists = stacked_rows(sizes, order, variant)
    row = tl.program_id(0) * variant.BLOCK_N + tl.arange(0, variant.BLOCK_N)
    tl.store(out + row * 4, b)
    tl.store(out + row * 4 + 1, h)
    tl.store(out + row * 4 + 2, n)
    tl.store(out + row * 4 + 3, exists.to(tl.int32) + 2 * hk)


@pytest.mark.parametrize("order", [None, [2, 0, 1]])
def test_a_key_heads_queries_stand_in_one_list(order):
    sizes = arguments.Sizes(B=3, N=2, M=1, heads=4, group=2)  # 12 rows a key head, in one tile of 16
    out = torch.full((2, 16, 4), -1, dtype=torch.int32)
    samples = None if order is None else torch.tensor(order, dtype=torch.int64)
    stacked_kernel[(2,)](out, sizes, samples, variant())
    for hk in range(2):
        rows = [[b, hk * 2 + g, n, 1 + 2 * hk] for b in order or range(3) for g in range(2) for n in range(2)]
        assert out[hk, :12].tolist() == rows
        assert out[hk, 12:].tolist() == [[*rows[-1][:3], 2 * hk]] * 4  # beyond the end the last is repeated


@triton.jit
def prefix_kernel(out, prefix, tasks):
    t = tl.program_id(0)
    tl.store(out + t, within_bank(prefix, t - 2))
    tl.store(out + 6 + t, length_of(prefix, within_bank(prefix, t - 2)))
    tl.store(out + 12 + t, next_prefix(prefix, tl.load(tasks + tl.arange(0, 4)), t - 2))


def test_prefixes_are_clamped_and_found_in_order(checked):
    call = checked(**BASE | {"T": 3, "lengths": True})
    lengths = torch.tensor([2, 9, -1])
    prefix = arguments.prefix(call)._replace(index=None, length=lengths)
    out = torch.full((3, 6), -1, dtype=torch.int32)
    prefix_kernel[(6,)](out, prefix, torch.tensor([1, 1, 2, 1]))
    assert out[0].tolist() == [0, 0, 0, 1, 2, 2]  # of -2..3
    assert out[1].tolist() == [2, 2, 2, 5, 0, 0]  # 9 and -1 are clamped to 0..P
    assert out[2].tolist() == [1, 1, 1, 2, 3, 3]  # the next in use; 3: there is none


@triton.jit
def weights_kernel(out, stored, n_shared, t, h, length, BLOCK: tl.constexpr):
    W = weight_rows(stored, n_shared, t, h, 0, length, BLOCK)
    i = tl.arange(0, BLOCK)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + i, W)


def test_weights_are_ones_then_products_then_zeros(checked):
    call = checked(**BASE | {"T": 2, "rank_key": 3})
    U, V = (x.detach() for x in call.reweight_key)
    out = torch.full((16, 16), torch.nan)
    stored = arguments.stored(call.prefix_key.detach(), (U, V))
    weights_kernel[(1,)](out, stored, 2, 1, 1, 4, 16)
    assert (out[:2] == 1).all() and (out[4:] == 0).all()
    torch.testing.assert_close(out[2:4], U[1, 2:4] @ V[1, :, 1])
