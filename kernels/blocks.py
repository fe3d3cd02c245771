"""The table of block sizes of the attention kernels by target, precision, head size and direction, blocks.json.

`python -m qtuning_fast.bench.plans.tune` measures candidates on the current GPU and rewrites its entries. Nothing is
tuned at run time, so the first call is as fast as the next, and the same seed gives the same bits.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

PATH = Path(__file__).with_name("blocks.json")
DIRECTIONS = (
    "forward",  # the output
    "queries",  # delta and dq
    "keys",  # dk, dv and the prefix's gradients
    "whole",  # all gradients at once, for calls with at most these numbers of queries, keys and prefix rows
    "merge",  # the prefix into the context's output
    "prefix-queries",  # delta and the prefix's part of dq
)
DEFAULT = "default"  # the target of entries for untuned devices


@dataclass(frozen=True)
class Blocks:
    """One entry of the table."""

    target: str  # "sm_90", "gfx942", "interpreter"; "default" for all others
    element_size: int  # bytes: 2 or 4
    head_size: int  # the largest head size of the entry
    direction: str
    queries: int  # rows of a query tile; the last two directions halve it if there are few queries
    keys: int  # rows of a tile of context keys; 0 in the last two directions, which read none, and if "whole" is off
    prefix: int  # rows of a tile of the prefix
    warps: int
    stages: int
    measured: str = ""  # device and versions of the measurement; empty: not measured


@cache
def table() -> tuple[Blocks, ...]:
    return tuple(Blocks(**entry) for entry in json.loads(PATH.read_text()))


def blocks_for(target: str, element_size: int, head_size: int, direction: str) -> Blocks:
    """Return the entry of the smallest head size that holds this one, from the default target if this one has none."""
    if direction in _instead:
        return _instead[direction]
    return _from_table(target, element_size, head_size, direction)


@contextmanager
def instead(blocks: Blocks) -> Iterator[None]:
    """Within the block, use these sizes for every call in their direction, to try them out."""
    global _edition
    _instead[blocks.direction] = blocks
    _edition += 1
    try:
        yield
    finally:
        del _instead[blocks.direction]
        _edition += 1


_instead: dict[str, Blocks] = {}
_edition = 0


def edition() -> int:
    """Return a number that changes whenever the block sizes change."""
    return _edition


@cache
def _from_table(target: str, element_size: int, head_size: int, direction: str) -> Blocks:
    for name in (target, DEFAULT):
        fitting = [
            entry
            for entry in table()
            if (entry.target, entry.element_size, entry.direction) == (name, element_size, direction)
            and entry.head_size >= head_size
        ]
        if fitting:
            return min(fitting, key=lambda entry: entry.head_size)
    raise KeyError(f"no block sizes for {element_size} bytes, head size {head_size}, {direction} in {PATH.name}")


def write(entries: Sequence[Blocks]) -> None:
    """Write the table, one entry a line, in a fixed order."""
    order = sorted(entries, key=lambda e: (e.target, -e.element_size, e.head_size, DIRECTIONS.index(e.direction)))
    lines = [json.dumps({name: value for name, value in asdict(entry).items() if value != ""}) for entry in order]
    PATH.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n")
    global _edition
    table.cache_clear()
    _from_table.cache_clear()
    _edition += 1
