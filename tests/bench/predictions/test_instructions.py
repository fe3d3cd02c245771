"""What instructions cost: pipes, latencies and bytes."""

import pytest

from qtuning_fast.bench.predictions.instructions import PIPES, SECTOR, Memory, bytes_of, cost
from qtuning_fast.bench.predictions.sass import CodeError, parse
from tests.bench.predictions.test_sass import row

MEMORY = Memory(bytes_a_clock=6.0, latency=300.0)


def one(text):
    return parse(row(text)).instructions[0]


def test_products_take_the_tensor_core_by_their_columns():
    clocks = {n: dict(cost(parse(row(f"HGMMA.64x{n}x16.F32.BF16 R24, gdesc[UR4], RZ")).instructions[0], MEMORY).pipes)
              for n in (64, 128, 256)}  # fmt: skip
    tensor = PIPES.index("tensor")
    assert [clocks[n][tensor] for n in (64, 128, 256)] == [32, 64, 128]


def test_bytes_are_those_of_a_warp():
    assert bytes_of(one("LDG.E.128 R4, desc[UR4][R2.64]")) == 16 * 32
    assert bytes_of(one("LDG.E R4, desc[UR4][R2.64]")) == SECTOR  # many lanes load the same row or column
    assert bytes_of(one("STG.E R4, desc[UR4][R2.64]")) == 4 * 32 and bytes_of(one("FADD R1, R1, R2")) == 0
    assert bytes_of(one("@!PT LDG.E.128 R4, desc[UR4][R2.64]")) == 0


def test_what_is_not_modelled_is_refused():
    with pytest.raises(CodeError, match="tensor memory accelerator"):
        cost(one("UTMALDG.2D [UR4], [UR6]"), MEMORY)
    assert cost(one("LDG.E.128 R4, desc[UR4][R2.64]"), MEMORY).latency == MEMORY.latency
