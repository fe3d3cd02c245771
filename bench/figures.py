"""Reads figures out of the entries of a file of results: medians, and ratios by the same clock."""

from collections.abc import Mapping
from typing import Any

from qtuning_fast.bench.peers import OURS

Row = Mapping[str, Any]  # as measure.as_json has it


def best(row: Row, which: str) -> dict[str, Any] | None:
    """The timing of a pass: the GPU's own where there is one, else the host's."""
    return row[which]["graph"] or row[which]["eager"]


def median(row: Row, which: str) -> float | None:
    """The milliseconds of a pass; None: not measured."""
    timing = best(row, which)
    return timing["median"] if timing else None


def same_clock(row: Row | None, other: Row | None, which: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Both timings: the GPU's own where both have it, else the host's. None if only one of them took turns."""
    if row is None or other is None or row.get("turns") != other.get("turns"):
        return None
    pairs = ((row[which][clock], other[which][clock]) for clock in ("graph", "eager"))
    return next(((a, b) for a, b in pairs if a and b), None)


def ratio(row: Row | None, other: Row | None, which: str) -> float | None:
    """The time of one row over that of another, by the same clock."""
    both = same_clock(row, other, which)
    return both[0]["median"] / both[1]["median"] if both else None


def slowdowns(entry: Mapping[str, Any], peer: str) -> dict[int, float]:
    """The time of a peer's step beside so many busy processes over its time alone; without what was not measured."""
    alone = median(entry["beside"]["0"][peer], "step")
    times = {int(count): median(rows[peer], "step") for count, rows in entry["beside"].items()}
    return {count: ms / alone for count, ms in times.items() if ms and alone}


def auto(entry: Mapping[str, Any], which: str) -> str | None:
    """The backend that `auto` takes; if it was not measured, the first of ours that was."""
    taken = entry["auto"]["backend"] if "auto" in entry else None
    measured = [name for name in (taken, *OURS) if name in entry["rows"] and median(entry["rows"][name], which)]
    return measured[0] if measured else None
