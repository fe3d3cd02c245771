"""Prints the figures of `qtuning-fast bench` on a terminal of 80 columns."""

import math
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from qtuning_fast.bench.figures import best, median, ratio
from qtuning_fast.bench.peers import PEERS

LOWER_BOUNDS = {  # the first that was measured
    "sdpa-no-concat": "PyTorch's attention without a gate, the prefix in its cache",
    "sdpa": "PyTorch's attention without a gate",
}
OWN = ("fused", "native", "composed", "reference")
LEGEND = "±: interquartile range; MB: beyond the inputs; error: largest, beside float64\n"


class Bars:
    """A listener that shows a progress bar for each stage while its context is open."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("{task.description:<16}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, console=console, transient=True)
        self.stages: dict[str, TaskID] = {}

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def __call__(self, stage: str, share: float) -> None:
        if stage not in self.stages:
            for earlier in self.stages.values():
                self.progress.update(earlier, completed=1.0)
            self.stages[stage] = self.progress.add_task(stage, total=1.0)
        self.progress.update(self.stages[stage], completed=share)


def times_table(entry: Mapping[str, Any]) -> Table:
    """One row a peer: milliseconds, the ratio to what `auto` takes, megabytes and the largest relative error."""
    rows, passes = entry["rows"], _passes(entry)
    whole, ours = passes[-1], rows[entry["auto"]["backend"]]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="\nMilliseconds a call of one layer", title_justify="left")
    table.add_column("peer", no_wrap=True)
    for name in (*passes, "±", "× ours", "MB", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in rows.items():
        if best(row, "forward") is None:
            table.add_row(name, *["–"] * (len(table.columns) - 1))
            continue
        spread = best(row, whole)
        table.add_row(
            name,
            *(_figure(median(row, each)) for each in passes),
            _figure(spread["spread"] if spread else None),
            _figure(ratio(row, ours, whole)),
            _figure(None if row["peak"] is None else row["peak"] / 2**20),
            f"{max(row['errors'].values()):.0e}",
        )
    return table


def peers_table(entry: Mapping[str, Any]) -> Table:
    """What each peer is, and why it has no figures."""
    table = Table.grid(padding=(0, 2))
    for name, row in entry["rows"].items():
        table.add_row(name, PEERS[name].about)
        if row["error"]:
            table.add_row("", Text(row["error"], style="red"))
    return table


def verdict(entry: Mapping[str, Any]) -> str:
    """A sentence that compares what `auto` takes with plain PyTorch and with attention without a gate."""
    rows, whole = entry["rows"], _passes(entry)[-1]
    name = entry["auto"]["backend"]
    ours = rows[name]
    if best(ours, whole) is None:
        return f"{name} was not measured: {ours['error']}"
    said = []
    if name != "eager" and (speedup := ratio(rows.get("eager"), ours, whole)):
        said.append(f"is {_figure(speedup, 2)} times as fast as eager")
    bound = next((each for each in LOWER_BOUNDS if each in rows and median(rows[each], whole)), None)
    if bound and (slowdown := ratio(ours, rows[bound], whole)):
        said.append(f"takes {_figure(slowdown, 2)} times the time of {LOWER_BOUNDS[bound]}")
    sentence = f"{name} {' and '.join(said) or f'takes {_figure(median(ours, whole))} ms'}."
    faster = [each for each in OWN if each in rows and _is_faster(rows[each], ours, whole)]
    if faster:
        first = min(faster, key=lambda each: median(rows[each], whole) or math.inf)
        share = _figure(ratio(rows[first], ours, whole), 2)
        sentence += f" Here {first} takes {share} times as long: QTUNING_FAST_BACKEND={first} chooses it."
    return sentence


def _passes(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return ("forward", "backward", "step") if entry["shape"]["trained"] else ("forward",)


def _is_faster(row: Mapping[str, Any], other: Mapping[str, Any], which: str) -> bool:
    """Whether a row is faster than another by more than noise."""
    a, b = best(row, which), best(other, which)
    return bool(a and b and b["median"] - a["median"] > a["spread"] + b["spread"])


def _figure(x: float | None, digits: int = 3) -> str:
    """A number with so many significant digits and without an exponent."""
    if x is None:
        return "–"
    before = math.floor(math.log10(abs(x))) if x else 0
    return f"{x:.{min(max(digits - 1 - before, 0), 5)}f}"
