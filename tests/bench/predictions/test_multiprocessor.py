"""SASS is executed: what is waited for, what overlaps, and what never makes a program faster or slower."""

import pytest

from qtuning_fast.bench.predictions.instructions import Memory
from qtuning_fast.bench.predictions.multiprocessor import simulate
from qtuning_fast.bench.predictions.sass import parse
from qtuning_fast.bench.predictions.trace import trace
from tests.bench.predictions.test_sass import row

MEMORY = Memory(bytes_a_clock=6.0, latency=300.0)
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


def time_of(text: str, times: int = 0, *, memory: Memory = MEMORY, warps: int = 1, residents: int = 1) -> float:
    code = parse(text)
    path = trace(code, code.loops, [times] * len(code.loops), at_most=64)
    return simulate(code, path, memory, memory, frozenset(), warps, residents).total


def test_a_result_is_waited_for():
    text = row("LDG.E R4, desc[UR4][R2.64]", sets=0) + row("FADD R5, R4, R4", waits=0b000001) + row("EXIT")
    assert time_of(text) > MEMORY.latency
    assert time_of(text.replace(row("FADD R5, R4, R4", waits=1), row("FADD R5, R4, R4"))) < 20


def test_special_functions_take_a_pipe_of_their_own():
    special, plain = row("MUFU.EX2 R4, R4") * 64, row("FADD R5, R5, R5") * 64
    assert time_of(special + row("EXIT")) == pytest.approx(8 * 64, abs=10)
    assert time_of(plain + row("EXIT")) == pytest.approx(64, abs=10)
    assert time_of(special + row("EXIT"), residents=2) == pytest.approx(16 * 64, abs=20)


def test_more_in_flight_is_never_slower():
    times = [time_of(pipelined(ahead), 12) for ahead in (1, 2, 3, 4)]
    assert times == sorted(times, reverse=True) and times[1] < 0.9 * times[0]


def test_more_bytes_are_never_faster():
    wide, narrow = pipelined(2), pipelined(2).replace(".128 ", ".64 ")
    slow = Memory(bytes_a_clock=1.0, latency=300.0)
    assert time_of(narrow, 12, memory=slow) < time_of(wide, 12, memory=slow)
    assert time_of(wide, 12, memory=MEMORY) < time_of(wide, 12, memory=slow)


def test_residents_hide_what_one_waits_for():
    one, two = (time_of(pipelined(1), 12, residents=residents) for residents in (1, 2))
    assert one <= two < 1.5 * one


def test_warps_of_a_program_meet_at_a_barrier():
    text = row("BAR.SYNC.DEFER_BLOCKING 0x0") + row("FADD R1, R1, R1") * 8 + row("EXIT")
    assert time_of(text, warps=4) == pytest.approx(20 + 4 * 9, abs=10)
