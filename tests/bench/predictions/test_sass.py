"""SASS is read from what nvdisasm prints."""

import pytest

from qtuning_fast.bench.predictions.sass import NONE, CodeError, parse


def word(*, stall: int = 1, sets: int = NONE, frees: int = NONE, waits: int = 0) -> str:
    """The upper half of an instruction that says so."""
    return f"0x{(waits << 11 | frees << 8 | sets << 5 | stall) << 41:016x}"


def row(text: str, address: int = 0, **control: int) -> str:
    return f"        /*{address:04x}*/    {text} ;   /* 0x0000000000000000 */\n    /* {word(**control)} */\n"


LOOP = (
    '\t//## File "/somewhere/kernels/forward.py", line 57\n'
    ".L_x_1:\n"
    + row("LDG.E.128 R4, desc[UR4][R2.64]", sets=2, stall=4)
    + row("@!P0 FFMA R8, R4, R5, R6", waits=0b000100, stall=5)
    + '\t//## File "/somewhere/kernels/forward.py", line 60\n'
    + row("@P0 BRA `(.L_x_1)", stall=6)
    + row("EXIT")
    + ".L_x_2:\n"
    + row("BRA `(.L_x_2)")
)


def test_an_instruction_says_what_it_waits_for():
    load, product, branch, *_ = parse(LOOP).instructions
    assert (load.name, load.base, load.sets, load.frees, load.stall) == ("LDG.E.128", "LDG", 2, NONE, 4)
    assert (product.predicate, product.waits, product.stall) == ("!P0", (2,), 5)
    assert branch.branches and branch.target == 0 and branch.predicate == "P0"


def test_a_loop_is_a_branch_back_with_the_line_of_its_for():
    (loop,) = parse(LOOP).loops
    assert (loop.first, loop.last, loop.file, loop.line) == (0, 2, "forward.py", 60)


def test_inner_loops_come_first():
    inner = ".L_x_2:\n" + row("NOP") + row("@P0 BRA `(.L_x_2)")
    text = ".L_x_1:\n" + row("NOP") + inner + row("@P1 BRA `(.L_x_1)") + row("EXIT")
    assert [(loop.first, loop.last) for loop in parse(text).loops] == [(1, 2), (0, 3)]


def test_another_text_is_refused():
    with pytest.raises(CodeError, match="no instruction"):
        parse("nvdisasm fatal: no such file")
    with pytest.raises(CodeError, match="upper half"):
        parse(row("NOP").splitlines()[0] + "\nsomething else")
