"""The way of a warp through the code: to loops that run, and around those that do not."""

import pytest

from qtuning_fast.bench.predictions.instructions import bytes_of
from qtuning_fast.bench.predictions.sass import CodeError, parse
from qtuning_fast.bench.predictions.trace import trace
from tests.bench.predictions.test_sass import row

COPY, COMMIT = "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]", "LDGDEPBAR"
PRODUCTS = (
    row("WARPGROUP.ARRIVE")
    + row("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24", stall=2)
    + row("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", stall=2)
    + row("WARPGROUP.DEPBAR.LE gsb0, 0x0", stall=2)
)


def pipelined(ahead: int, work: int = 50) -> str:
    """A loop that copies what it needs `ahead` iterations later and waits for what it needs now."""
    copy = row(COPY, stall=2) + row(COMMIT, stall=2)
    body = row(f"DEPBAR.LE SB0, {hex(ahead - 1)}", stall=4) + PRODUCTS + row("FADD R1, R1, R2", stall=5) * work + copy
    return copy * ahead + ".L_x_1:\n" + body + row("@P0 BRA `(.L_x_1)", stall=5) + row("EXIT")


def test_copies_for_iterations_that_do_not_come_are_left_out():
    code = parse(pipelined(3))
    path = trace(code, code.loops, [2], at_most=64)
    copies = [at for at, index in enumerate(path.indexes) if bytes_of(code.instructions[index])]
    assert len(copies) == 5 and len(set(copies) - path.nothing) == 2


def test_the_way_leads_to_loops_that_run_and_around_those_that_do_not():
    loop = ".L_x_1:\n" + row("NOP") + row("@P0 BRA `(.L_x_1)")
    code = parse(row("@P1 BRA `(.L_x_2)") + loop + ".L_x_2:\n" + row("EXIT"))
    assert trace(code, code.loops, [0], at_most=8).indexes == (0, 3)
    assert trace(code, code.loops, [3], at_most=8).indexes == (0, 1, 2, 1, 2, 1, 2, 3)
    assert trace(code, code.loops, [3], at_most=2).indexes == (0, 1, 2, 1, 2, 3)
    far = parse(row("@P1 BRA `(.L_x_1)") + row("EXIT") + loop + row("EXIT"))
    assert trace(far, far.loops, [1], at_most=8).indexes == (0, 2, 3, 4)


def test_a_loop_that_no_way_leads_to_is_named():
    code = parse(row("EXIT") + ".L_x_1:\n" + row("NOP") + row("@P0 BRA `(.L_x_1)") + row("EXIT"))
    with pytest.raises(CodeError, match="no way"):
        trace(code, code.loops, [1], at_most=8)
