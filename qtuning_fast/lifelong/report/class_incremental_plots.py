"""The plots of answers without the task's name, one function per plot, from `class_incremental` of metrics.json.

A run without that block, or of one task, raises `NoDataError` with the same sentence from each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from qtuning_fast.lifelong.metrics import Metrics, named_summary, unnamed_results
from qtuning_fast.lifelong.report.plot_style import (
    FAINT,
    INK,
    OTHER_COLOUR,
    PALETTE,
    WIDTH,
    legend,
    new_figure,
    start_y_at_zero,
    task_ticks,
)
from qtuning_fast.lifelong.report.plots import NoDataError

BINS = 10  # of equal width, in which confidences are counted
FEW = 15  # up to that many tasks a cell of a matrix has room for its number


def unnamed_accuracy(metrics: Metrics) -> Figure:
    """Mean accuracy over the tasks seen so far when the task is not named, below that of the named task."""
    _block(metrics)
    names = metrics["tasks"]
    figure, [axes] = new_figure("Average accuracy over the tasks seen so far, task not named", height=4.6)
    if named_summary(metrics):
        means = _mean_of_rows(metrics["task_adapter"])
        axes.plot(means, linestyle=":", linewidth=2, color=PALETTE["task_adapter"], label="adapters, task named")
    for name, result in unnamed_results(metrics).items():
        style: dict[str, Any] = {
            "color": PALETTE.get(name, OTHER_COLOUR),
            "label": "adapters, task inferred" if name == "adapters" else name.replace("_", " "),
        }
        if "accuracy_matrix" in result:
            kind = "--" if name in metrics["class_incremental"]["baselines"] else "-"
            axes.plot(_mean_of_rows(result), linestyle=kind, marker="o", markersize=4, **style)
        else:  # known after the last task only; the mark may stand on the frame
            last = [len(names) - 1], [result["average_accuracy"]]
            axes.plot(*last, linestyle="", marker="D", markersize=7, markerfacecolor="none", clip_on=False, **style)
    task_ticks(axes.xaxis, names)
    axes.set_xlabel("after learning")
    axes.set_ylabel("mean accuracy")
    axes.set_ylim(0, 1.02)
    legend(axes)
    return figure


def confusion(metrics: Metrics) -> Figure:
    """Which task (columns) the test examples of each task (rows) are taken for, after the last one."""
    shares = np.array(_block(metrics)["confusion"], dtype=float)
    tasks = len(shares)
    few = tasks <= 8
    figure, [axes] = new_figure("Which task is taken for which", height=5 if few else 7, width=6 if few else WIDTH)
    # Most shares off the diagonal are small; a root spreads them over the scale, which the colour bar shows.
    image = axes.imshow(shares, norm=PowerNorm(0.5, vmin=0, vmax=1), cmap="Blues", aspect="equal")
    axes.grid(False)
    if tasks <= FEW:
        for i, j in zip(*np.nonzero(shares >= 0.005)):  # below that it would be a written 0.00
            ink = "white" if shares[i, j] > 0.4 else "black"
            axes.text(j, i, f"{shares[i, j]:.2f}", ha="center", va="center", color=ink, fontsize=10 if few else 7)
    task_ticks(axes.xaxis, metrics["tasks"])
    task_ticks(axes.yaxis, metrics["tasks"])
    axes.set_xlabel("taken for")
    axes.set_ylabel("test examples of")
    figure.colorbar(image, ax=axes, label="share of the row", shrink=0.8, ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.5, 1])
    return figure


def largest_confusions(metrics: Metrics, most: int = 5) -> list[tuple[str, str, float]]:
    """Up to `most` pairs (task, task it is taken for, share of its test examples), the largest share first."""
    shares = np.array((metrics.get("class_incremental") or {}).get("confusion") or np.empty((0, 0)), dtype=float)
    names = metrics["tasks"]
    wrong = [
        (names[i], names[j], float(shares[i, j])) for i, j in np.argwhere(shares >= 0.005).tolist() if i != j
    ]  # what rounds to zero is no confusion to look at
    return sorted(wrong, key=lambda pair: -pair[2])[:most]


def reliability(metrics: Metrics) -> Figure:
    """How often the task is found where the model is that sure of it, above the number of examples."""
    calibration = _block(metrics)["calibration"]
    bins = np.array(calibration["bins"], dtype=float).reshape(-1, 3)
    if not len(bins):
        raise NoDataError("Confidence in the task: there were no test examples.")
    sure, found, counts = bins.T
    title = f"Confidence in the task, calibration error {calibration['error']:.3f}"
    figure, [share, count] = new_figure(title, height=5.4, panels=2, width=6)
    share.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="as sure as right")
    low, high = _interval_of_share(found, counts)
    share.errorbar(
        sure, found, yerr=[found - low, high - found], color=PALETTE["closed_form"], marker="o", markersize=5,
        linewidth=1.5, elinewidth=1, capsize=2, label="task found", clip_on=False, zorder=3,
    )  # fmt: skip
    share.set_ylim(0, 1.02)
    share.set_ylabel("share whose task\nis found")
    legend(share)

    place = (np.minimum(np.floor(sure * BINS), BINS - 1) + 0.5) / BINS
    bars = count.bar(place, counts, width=0.9 / BINS, color=PALETTE["closed_form"])
    count.bar_label(bars, [f"{number:.0f}" for number in counts], fontsize=8, color=INK, padding=1)
    start_y_at_zero(count, counts.max())
    count.set_ylabel("test examples")
    count.set_xlabel("confidence: p(t|x) of the likeliest task")
    count.set_xlim(0, 1)
    count.set_xticks(np.linspace(0, 1, 6))
    return figure


def no_known_task(metrics: Metrics) -> Figure:
    """How well each task is told from the others while they are the only known ones, and how often that is said."""
    unknown, names = _block(metrics)["unknown"], metrics["tasks"]
    says = unknown.get("threshold") is not None and unknown.get("detected") is not None
    title = "Each task held out: is it seen to be of no known task?"
    row = 0.5 if len(names) <= FEW else 0.26  # inches a task
    figure, panels = new_figure(title, height=1.7 + row * len(names), panels=1 + says, beside=True)
    _bars(panels[0], unknown["auroc"])
    panels[0].axvline(0.5, color=INK, linewidth=1, linestyle=":", label="0.5: a guess")
    panels[0].set_xlabel(f"AUROC, mean {unknown['mean_auroc']:.3f}")
    if says:
        _bars(panels[1], unknown["detected"])
        _false_alarms(panels[1], unknown)
        panels[1].set_xlabel(f"share detected, mean {unknown['mean_detected']:.3f}")
    task_ticks(panels[0].yaxis, names, limit=len(names))
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    panels[0].set_ylabel("held out")
    for axes in panels:
        legend(axes, columns=1)
    return figure


def _block(metrics: Metrics) -> Mapping[str, Any]:
    block = metrics.get("class_incremental")
    if block is None:
        raise NoDataError("This run was not evaluated without the names of the tasks.")
    if len(metrics["tasks"]) == 1:
        raise NoDataError("There was one task only, so that there was nothing to infer and none to hold out.")
    return block


def _mean_of_rows(evaluation: Mapping[str, Any]) -> np.ndarray:
    """Mean accuracy over the tasks seen so far, after each task."""
    return np.nanmean(np.array(evaluation["accuracy_matrix"], dtype=float), axis=1)


def _interval_of_share(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95% interval of shares of so many examples; it holds the share itself."""
    z = 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return np.minimum(middle - half, share), np.maximum(middle + half, share)


def _bars(axes: Axes, values: Sequence[float | None]) -> None:
    """One horizontal bar a task from 0 to 1, its number behind it; a task without a value has none."""
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    places, shares = [place for place, _ in known], [value for _, value in known]
    bars = axes.barh(places, shares, height=0.7, color=PALETTE["closed_form"])
    axes.bar_label(bars, [f"{value:.2f}" for value in shares], fontsize=8, color=INK, padding=2)
    axes.grid(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_xlim(0, 1.12)
    axes.set_xticks(np.linspace(0, 1, 6))


def _false_alarms(axes: Axes, unknown: Mapping[str, Any]) -> None:
    """Lines at the share of known tasks' examples of which that is said, too: promised, and measured."""
    promised, measured_rate = unknown["false_alarm_rate"], unknown.get("false_alarms")
    axes.axvline(promised, color=INK, linewidth=1, linestyle=":", label=f"false alarms promised: {promised:.3f}")
    if measured_rate is not None:
        axes.axvline(measured_rate, color=INK, linewidth=1, label=f"false alarms measured: {measured_rate:.3f}")
