"""Draws the pictures of docs/performance.md, one for each file of results."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from qtuning_fast.bench.figures import auto, best, median, same_clock
from qtuning_fast.lifelong.report.plot_style import FAINT, INK, WIDTH, legend, new_figure

Document = Mapping[str, Any]

# Okabe and Ito's colours; ours is the same blue everywhere.
STYLE = {
    "fused": ("#0072B2", "o", "fused (ours)"),
    "native": ("#0072B2", "D", "native (ours)"),
    "composed": ("#56B4E9", "o", "composed (ours)"),
    "reference": ("#6b6b6b", "X", "the definition, float32 (ours)"),
    "eager": ("#D55E00", "s", "eager PyTorch"),
    "eager-compiled": ("#E69F00", "s", "eager under torch.compile"),
    "flex-frozen-gate": ("#009E73", "^", "FlexAttention, gate frozen"),
    "flex": ("#009E73", ">", "FlexAttention"),
    "flex-merged": ("#009E73", "v", "FlexAttention, merged"),
    "flex-approx-frozen-gate": ("#009E73", "<", "FlexAttention, tanh.approx, gate frozen"),
    "sdpa": ("#CC79A7", "D", "PyTorch's attention, no gate"),
    "sdpa-no-concat": ("#8c4a73", "d", "the same, prefix in place already"),
}


def against_peers(document: Document) -> Figure:
    """Each peer's time over ours, shape by shape."""
    entries = [e for e in document["entries"].values() if e["shape"]["trained"]]
    peers = [name for name in STYLE if any(name in entry["rows"] for entry in entries)]
    ours = _ours(entries)
    figure, [axes] = new_figure("A training step of one layer: time relative to ours", 0.42 * len(entries) + 1.9)
    axes.axvline(1, color=INK, linewidth=0.8)
    named: set[str] = set()
    for y, entry in enumerate(entries):
        for name in peers:
            for which, face in (("step", None), ("forward", "white")):
                point = _relative(entry, name, which)
                if point is None or (which == "forward" and _relative(entry, name, "step")):
                    continue
                color, marker, label = _style(name, ours)
                if which == "forward":
                    label += ", forward only"
                shown = label if label not in named else None
                named.add(label)
                axes.errorbar(
                    *(point[0], y),
                    xerr=point[1],
                    color=color,
                    marker=marker,
                    markerfacecolor=face or color,
                    markersize=6.5,
                    linestyle="none",
                    elinewidth=1,
                    label=shown,
                    zorder=3 if name == ours else 2,
                )
    axes.set_yticks(range(len(entries)), [_shape_label(entry) for entry in entries], fontsize=8)
    axes.invert_yaxis()
    _times_axis(axes)
    _legend_below(figure, axes, 3)
    return figure


def decoding(document: Document) -> Figure:
    """New tokens a second, shape by shape."""
    entries = list(document["entries"].values())
    peers = [name for name in STYLE if any(_ms(entry, name, "forward") for entry in entries)]
    figure, [axes] = new_figure("Decoding in one layer: new tokens a second", 0.8 + 0.22 * len(entries) * len(peers))
    height = 0.8 / len(peers)
    ours = _ours(entries)
    for number, name in enumerate(peers):
        color, _, label = _style(name, ours)
        for y, entry in enumerate(entries):
            ms = _ms(entry, name, "forward")
            rate = entry["shape"]["B"] / ms * 1e3 if ms else 0.0
            at = y + (number - (len(peers) - 1) / 2) * height
            axes.barh(at, rate, height * 0.9, color=color, label=label if y == 0 else None)
            axes.text(rate, at, f" {_rounded(rate)}" if ms else " cannot", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(entries)), [_shape_label(entry) for entry in entries], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.grid(axis="y", visible=False)
    _legend_below(figure, axes, 2)
    return figure


def ingredients(document: Document) -> Figure:
    """What each ingredient adds to a step."""
    entries = list(document["entries"].values())
    figure, panels = new_figure("What each ingredient adds to a step", 0.7 + 1.45 * len(entries), len(entries))
    for axes, entry in zip(panels, entries):
        everything = best(entry["rows"]["all"], "step")
        names, costs, spreads = [], [], []
        for name, row in entry["rows"].items():
            timing = best(row, "step")
            if name != "all" and timing and everything:
                names.append(name.replace("without ", "").replace("any", "all of them"))
                costs.append(100 * (everything["median"] - timing["median"]) / timing["median"])
                spreads.append(50 * np.hypot(everything["spread"], timing["spread"]) / timing["median"])
        axes.barh(names, costs, xerr=spreads, color=STYLE["fused"][0], ecolor=INK, height=0.65)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.invert_yaxis()
        axes.set_title(f"{entry['peer']}, {entry['title']}", fontsize=9, loc="left", color=INK)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.grid(axis="y", visible=False)
    panels[-1].set_xlabel("% of the time without it; half an interquartile range beside it", fontsize=9)
    return figure


def growth(document: Document) -> Figure:
    """Time over the length, the prefix's rows, the batch and the tasks in a batch."""
    entries = document["entries"]
    figure = Figure(figsize=(WIDTH, 6.4), dpi=144, layout="constrained", facecolor="white")
    figure.suptitle("How the time of one layer grows", fontsize=12, color=INK, fontweight="bold")
    words = {"N": "tokens N", "P": "prefix rows P", "B": "batch B", "tasks": "tasks in a batch"}
    ours = _ours([{"rows": rows} for entry in entries.values() for rows in entry["points"].values()])
    for axes, (name, entry) in zip(figure.subplots(2, 2).flat, entries.items()):
        sizes = np.array([int(size) for size in entry["points"]])
        for peer in entry["peers"]:
            times = [median(rows[peer], entry["pass"]) for rows in entry["points"].values()]
            color, marker, label = _style(peer, ours)
            milliseconds = np.array([np.nan if ms is None else ms for ms in times])
            axes.plot(sizes, milliseconds, color=color, marker=marker, markersize=4.5, linewidth=1.5, label=label)
        axes.set_xscale("log", base=2)
        _log_or_from_zero(axes)
        axes.xaxis.set_major_locator(FixedLocator(list(sizes)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(words.get(name, name), fontsize=9)
        axes.set_ylabel("ms a step" if entry["pass"] == "step" else "ms a forward pass", fontsize=9)
        _plain(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def lifelong(document: Document) -> Figure:
    """Time, memory and size of task after task."""
    panels = [
        ("step_ms", 1.0, "ms a step"),
        ("resident_bytes", 2**20, "memory, MiB"),
        ("adapter_bytes", 2**20, "a task's adapter, MiB"),
    ]
    figure, all_axes = new_figure("200 tasks in a row: what one more task costs", 7.2, len(panels))
    colors = {"queue": STYLE["fused"][0], "accumulate": STYLE["eager"][0]}
    names = {"queue": "a queue of five prompts (ours)", "accumulate": "prompts that accumulate (Progressive Prompts)"}
    for axes, (figure_name, unit, label) in zip(all_axes, panels):
        for method, entry in document["entries"].items():
            tasks = [each["task"] for each in entry["per_task"]]
            values = np.array([np.nan if (x := each[figure_name]) is None else x / unit for each in entry["per_task"]])
            axes.plot(tasks, values, ".", color=colors[method], markersize=2.5, alpha=0.45)
            axes.plot(tasks, _running_median(values, 9), color=colors[method], linewidth=1.8, label=names[method])
        axes.set_ylabel(label, fontsize=9)
        axes.set_ylim(bottom=0)
    legend(all_axes[0], 2)
    all_axes[-1].set_xlabel("task", fontsize=9)
    return figure


def models(document: Document) -> Figure:
    """Tokens a second and memory of whole models."""
    entries = document["entries"]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.29 * sum(len(e["rows"]) + 2 for e in entries.values())), dpi=144)
    figure.set_layout_engine("constrained")
    figure.suptitle("Training whole models with a prefix", fontsize=12, color=INK, fontweight="bold")
    heights = [len(entry["rows"]) for entry in entries.values()]
    grid = figure.subplots(len(entries), 2, squeeze=False, height_ratios=heights, sharey="row")
    for (left, right), (name, entry) in zip(grid, entries.items()):
        rows = entry["rows"]
        ways = list(rows)
        colors = [STYLE["fused"][0] if way.startswith("qtuning_fast") else "#9aa5ad" for way in ways]
        rates = [row["tokens_per_second"] or 0.0 for row in rows.values()]
        peaks = [(row["peak_bytes"] or 0) / 2**20 for row in rows.values()]
        for axes, values, title in ((left, rates, "tokens a second"), (right, peaks, "memory beyond the weights, MiB")):
            axes.barh(ways, values, color=colors, height=0.7)
            for y, value in enumerate(values):
                text = _rounded(value) if value else "cannot train here" if not rates[y] else "not known"
                axes.text(value, y, f" {text}", va="center", fontsize=8, color=INK)
            axes.set_title(f"{name} ({entry['of']}): {title}" if axes is left else title, fontsize=9, loc="left")
            axes.margins(x=0.2)
            _plain(axes)
            axes.grid(axis="y", visible=False)
        left.invert_yaxis()
    return figure


# Pieces


def _ours(entries: Sequence[Mapping[str, Any]]) -> str:
    """The backend that ratios refer to: the first of ours that ran."""
    measured = {name for entry in entries for name in entry["rows"]}
    return next((name for name in ("fused", "native") if name in measured), "composed")


def _style(name: str, ours: str) -> tuple[str, str, str]:
    color, marker, label = STYLE[name]
    if name != ours:
        return color, marker, label
    return STYLE["fused"][0], marker, f"{name} (ours)"


def _relative(entry: Mapping[str, Any], name: str, which: str) -> tuple[float, float] | None:
    """A peer's time over ours, by the same clock, and half the interquartile range of it."""
    ours = auto(entry, which)
    both = same_clock(entry["rows"].get(name), entry["rows"][ours], which) if ours else None
    return (both[0]["median"] / both[1]["median"], both[0]["spread"] / 2 / both[1]["median"]) if both else None


def _ms(entry: Mapping[str, Any], name: str, which: str) -> float | None:
    return median(entry["rows"][name], which) if name in entry["rows"] else None


def _shape_label(entry: Mapping[str, Any]) -> str:
    return f"{entry['shape']['of']}\n{entry['title']}"


def _times_axis(axes: Axes) -> None:
    """A logarithmic axis of ratios, with ticks that can be read."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [x for x in (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100) if low * 0.95 <= x <= high * 1.05]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("← faster than ours      slower than ours →", fontsize=9)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)


def _log_or_from_zero(axes: Axes) -> None:
    """A logarithmic axis, or one from zero if all values are close, so that a flat line looks flat."""
    low, high = axes.dataLim.intervaly
    if high < 5 * low:
        axes.set_ylim(0, 1.15 * high)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    """The median of the `width` values around each value; fewer at the ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.median(window) for window in windows])


def _rounded(x: float) -> str:
    """A number with three digits."""
    if x >= 1000:
        digits = len(str(int(x))) - 3
        return f"{round(x, -digits):,.0f}"
    return f"{x:.3g}"


PICTURES = {
    "attention": against_peers,
    "decode": decoding,
    "ingredients": ingredients,
    "growth": growth,
    "lifelong": lifelong,
    "models": models,
}
