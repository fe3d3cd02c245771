"""What the plots share: colours, axes of tasks, and bands over layers.

Figures use matplotlib's objects, never pyplot: no window, no global state.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure

WIDTH = 8.2  # inches; at 96 pixels an inch the width of the report's column
INK, FAINT = "#333333", "#d9d9d9"

# Okabe and Ito's colours stay apart under the common forms of colour blindness.
PALETTE = {
    "task_adapter": "#0072B2",
    "live_queue": "#D55E00",
    "linear_probe": "#6b6b6b",
    "adapters": "#0072B2",  # the same adapters, their task inferred
    "joint_head": "#E69F00",
    "closed_form": "#CC79A7",
    "nearest_class_mean": "#6b6b6b",
    "joint_regression": "#000000",
}
OTHER_COLOUR = "#009E73"  # any other baseline


def new_figure(
    title: str, height: float, panels: int = 1, width: float = WIDTH, *, beside: bool = False
) -> tuple[Figure, list[Axes]]:
    """A titled figure of `panels` axes, one above the other, that share x; or `beside` each other, sharing y."""
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, color=INK, fontweight="bold")
    rows, columns = (1, panels) if beside else (panels, 1)
    panels_axes = list(figure.subplots(rows, columns, sharex=not beside, sharey=beside, squeeze=False).flat)
    for axes in panels_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, colors=INK)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels_axes


def label(name: str, limit: int = 22) -> str:
    """A user's name in a plot: one line of at most `limit` characters, with dollars as characters."""
    line = " ".join(name.split())
    short = line if len(line) <= limit else line[: limit - 1] + "…"
    return short.replace("$", r"\$")


def task_ticks(axis: Axis, names: Sequence[str], at: Sequence[float] | None = None, limit: int = 24) -> None:
    """Name the tasks along an axis; with more than `limit`, only every k-th, so that names never overlap."""
    every = -(-len(names) // limit)
    ticks = np.arange(len(names)) if at is None else np.asarray(at)
    shown = [label(name) for name in names[::every]]
    axis.set_ticks(ticks[::every], shown)
    if isinstance(axis, XAxis) and sum(map(len, shown)) > 70:
        axis.set_tick_params(rotation=45 if len(shown) <= 12 else 90)
        for text in axis.get_ticklabels():
            text.set_horizontalalignment("right" if len(shown) <= 12 else "center")
            text.set_rotation_mode("anchor" if len(shown) <= 12 else "default")


def start_y_at_zero(axes: Axes, highest: float) -> None:
    """Start y at zero and leave space at the top, so that a flat line looks flat."""
    axes.set_ylim(0, 1.15 * highest if highest > 0 else 1)


def legend(axes: Axes, columns: int = 3) -> None:
    """A legend above the axes, where no curve can run through it."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=9, frameon=False, borderaxespad=0.2)


def pad_rows(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of different lengths as one float array, padded with NaN."""
    array = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for line, row in zip(array, rows):
        line[: len(row)] = row
    return array


def band(axes: Axes, x: np.ndarray, values: np.ndarray, color: str, name: str | None = None) -> None:
    """Draw the mean of `values[:, x]` over the first axis as a line, and its range as a band."""
    axes.plot(x, np.nanmean(values, axis=0), color=color, marker="o", markersize=3.5, linewidth=1.5, label=name)
    if len(values) > 1:
        axes.fill_between(x, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=color, alpha=0.12, linewidth=0)


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Up to `limit` of `count` positions, evenly spaced, including the first and the last."""
    return sorted({int(position) for position in np.linspace(0, count - 1, min(count, limit)).round()})


def sequential_colours(count: int) -> list[str]:
    """Colours for `count` things in a sequence, dark to light."""
    positions = np.linspace(0.05, 0.8, count)  # viridis without its pale end, which is hard to see on white
    return ["#{:02x}{:02x}{:02x}".format(*colormaps["viridis"](p, bytes=True)[:3]) for p in positions]
