"""Reads SASS, the machine code of NVIDIA's GPUs: instructions, how they wait for each other, and loops.

A cubin is disassembled by `nvdisasm`, which lies in triton's package. Since Volta the compiler writes into each
instruction when the next may follow and which of six barriers it sets and waits for (Jia et al., "Dissecting the NVIDIA
Volta GPU Architecture via Microbenchmarking", arXiv 1804.06826, section 2.1): bits 105 to 125 of 128,

    105-108  cycles until the warp's next instruction
    110-112  the barrier that is set when the result is there; 7: none
    113-115  that is set when the operands have been read; 7: none
    116-121  barriers that are waited for before it is issued

The compiler also says which line of source an instruction comes from. A loop is a branch back; its line is that of the
`for` or `while`.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import triton

NONE = 7  # a barrier's number where there is none
_BITS_IN_LOW_WORD = 64
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_HIGH_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LABEL = re.compile(r"(\.L_[\w.$]+|\$[\w.$]+):")
_TARGET = re.compile(r"`\(([^)]+)\)")
_BRANCHES = ("BRA", "JMP")


class CodeError(ValueError):
    """The code has a form that is not known here."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp."""

    predicate: str  # "P0", "!P0", "!PT": never; "": always
    name: str  # "MUFU.EX2"
    operands: str
    file: str  # of the source; without its folder
    line: int
    stall: int  # cycles until the warp's next one
    sets: int  # the barrier that says that its result is there; NONE
    frees: int  # that says that its operands have been read; NONE
    waits: tuple[int, ...]  # for these barriers before it is issued
    target: int | None = None  # of a branch: the index of an instruction

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def branches(self) -> bool:
        return self.base in _BRANCHES and self.target is not None


@dataclass(frozen=True)
class Loop:
    """Instructions first..last; the last one branches back to the first."""

    first: int
    last: int
    file: str
    line: int


@dataclass(frozen=True)
class Code:
    """The code of a kernel."""

    instructions: tuple[Instruction, ...]

    @property
    def loops(self) -> list[Loop]:
        """In the order of their last instructions; inner ones come before those around them.

        Where several branches lead back to one place (`continue`), the last makes the loop. An endless branch to itself
        is padding behind the end.
        """
        found: dict[int, Loop] = {}
        for index, instruction in enumerate(self.instructions):
            if instruction.branches and instruction.target is not None and instruction.target < index:
                found[instruction.target] = Loop(instruction.target, index, instruction.file, instruction.line)
        return sorted(found.values(), key=lambda loop: (loop.last, -loop.first))


@lru_cache(maxsize=8)  # one kernel is looked at on several shapes
def disassemble(cubin: bytes) -> Code:
    """The code of a cubin that holds one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        command = [tool, "-c", "-g", "-hex", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> Code:
    """The code in what `nvdisasm -c -g -hex` prints. Raises CodeError."""
    found: list[tuple[str, str, int, int]] = []  # the instruction, its source's file and line, its upper 64 bits
    labels: dict[str, int] = {}
    file, line = "", 0
    pending: tuple[str, str, int] | None = None
    for row in text.splitlines():
        if pending is not None:
            high = _HIGH_WORD.match(row)
            if high is None:
                raise CodeError(f"an instruction without its upper half: {pending[0]}")
            found.append((*pending, int(high[1], 16)))
            pending = None
        elif match := _INSTRUCTION.match(row):
            pending = match[2], file, line
        elif match := _LINE.search(row):
            file, line = Path(match[1]).name, int(match[2])
        elif match := _LABEL.match(row):
            labels[match[1]] = len(found)
    if not found:
        raise CodeError("no instruction in this text: is it what nvdisasm -c -g -hex prints?")
    return Code(tuple(_instruction(*one, labels) for one in found))


def _instruction(text: str, file: str, line: int, high: int, labels: dict[str, int]) -> Instruction:
    predicate = ""
    if text.startswith("@"):
        predicate, _, text = text[1:].partition(" ")
    name, _, operands = text.strip().partition(" ")
    control = high >> (105 - _BITS_IN_LOW_WORD)
    waits = control >> 11 & 0b111111
    target = _TARGET.search(operands)
    return Instruction(
        predicate=predicate,
        name=name,
        operands=operands.strip(),
        file=file,
        line=line,
        stall=control & 0b1111,
        sets=control >> 5 & 0b111,
        frees=control >> 8 & 0b111,
        waits=tuple(barrier for barrier in range(6) if waits >> barrier & 1),
        target=labels.get(target[1]) if target else None,
    )
