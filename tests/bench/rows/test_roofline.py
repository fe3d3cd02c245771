"""Work is counted by hand."""

from dataclasses import replace

from qtuning_fast.bench.rows.roofline import Ceilings, backward_work, forward_work
from qtuning_fast.bench.shapes import Shape

SHAPE = Shape("by hand", B=1, Hq=1, Hkv=1, N=2, D=4, P=3)
PREFIX = 4 * (2 * (3 * 4 + 3 + 4) + 2)


def test_a_forward_pass():
    work = forward_work(SHAPE)
    assert work.flops == 2 * 2 * (2 * (2 + 3)) * 4  # two products, ten pairs, four numbers each
    assert work.special == 10 + 6
    assert work.bytes == 3 * 2 * 4 * 2 + PREFIX + 2 * (4 * 2 + 4)


def test_a_backward_pass():
    assert backward_work(SHAPE).flops == 5 * 2 * 10 * 4


def test_only_pairs_that_are_seen_count():
    whole = forward_work(SHAPE).flops
    assert forward_work(replace(SHAPE, is_causal=True)).flops == whole * 9 // 10  # one pair of ten is hidden
    assert forward_work(replace(SHAPE, B=2, padding=0.25)).flops == 2 * whole * 9 // 10
    decoding = replace(SHAPE, N=1, context=5, is_causal=True)
    assert forward_work(decoding).flops == 2 * 2 * (5 + 3) * 4


def test_windows_packing_and_caps_count():
    wide = replace(SHAPE, B=2, N=8, window=(2, 1))
    pairs = 8 * 8 - sum(abs(i - j) > (2 if j < i else 1) for i in range(8) for j in range(8))
    assert forward_work(wide).flops == 4 * SHAPE.Hq * 2 * (pairs + 8 * SHAPE.P) * SHAPE.D
    packed = replace(SHAPE, B=4, N=27, padding=2 / 3, packed=True)
    assert packed.lengths == [27, 12, 3, 1]
    seen = sum(n * n for n in packed.lengths) + sum(packed.lengths) * SHAPE.P
    assert forward_work(packed).flops == 4 * SHAPE.Hq * seen * SHAPE.D
    padded = forward_work(replace(packed, packed=False))
    assert padded.flops == 4 * SHAPE.Hq * (27 * 43 + 4 * 27 * SHAPE.P) * SHAPE.D and padded.bytes > 0
    capped = forward_work(replace(SHAPE, softcap=9.0))
    assert capped.special > forward_work(SHAPE).special and capped.flops == forward_work(SHAPE).flops


def test_each_prefix_in_use_is_read_once():
    one, three = forward_work(SHAPE), forward_work(replace(SHAPE, tasks=3))
    assert three.bytes - one.bytes == 2 * PREFIX and three.flops == one.flops
    folded = forward_work(replace(SHAPE, trained=False))
    assert one.bytes - folded.bytes == PREFIX - 2 * (2 * 3 * 4 + 2)


def test_the_floor_is_the_slowest_of_products_bytes_and_special_functions():
    work = forward_work(SHAPE)
    milliseconds, limit = work.least_ms(Ceilings(flops=1e3, copied=1e9, read=1e8, special=0.0))
    assert (milliseconds, limit) == (work.flops, "products")
    milliseconds, limit = work.least_ms(Ceilings(flops=1e12, copied=1e3, read=2e3, special=0.0))
    assert (milliseconds, limit) == (work.bytes / 2, "bytes")
