"""The plots of a run, one function per plot, from the content of metrics.json.

A plot without data raises `NoDataError` with a sentence that says why.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from qtuning_fast.lifelong.metrics import EVALUATIONS, START_ROWS, Metrics, final_accuracies, in_words, measured
from qtuning_fast.lifelong.report.plot_style import (
    FAINT,
    INK,
    OTHER_COLOUR,
    PALETTE,
    WIDTH,
    band,
    evenly_spaced,
    label,
    legend,
    new_figure,
    pad_rows,
    sequential_colours,
    start_y_at_zero,
    task_ticks,
)


class NoDataError(Exception):
    """The run has no data for a plot; the message tells the reader why."""


def accuracy_matrix(metrics: Metrics, evaluation: str) -> Figure:
    """Accuracy on each task (columns) after training on each task (rows), on one colour scale for every run."""
    word = measured(metrics)
    title = in_words(f"Accuracy matrix: {evaluation}", word)
    if evaluation not in metrics:
        raise NoDataError(f"{title}: this run was not evaluated that way.")
    R = np.array(metrics[evaluation]["accuracy_matrix"], dtype=float)
    tasks = len(R)
    if tasks == 1:
        raise NoDataError(f"{title}: one task makes one number, which the table shows.")
    figure, [axes] = new_figure(title, height=5 if tasks <= 8 else 7, width=6 if tasks <= 8 else WIDTH)
    image = axes.imshow(R, vmin=0, vmax=1, cmap="cividis", aspect="equal")
    axes.grid(False)
    if tasks <= 15:
        for i, j in zip(*np.nonzero(~np.isnan(R))):
            ink = "black" if R[i, j] > 0.55 else "white"
            axes.text(j, i, f"{R[i, j]:.2f}", ha="center", va="center", color=ink, fontsize=10 if tasks <= 8 else 8)
    task_ticks(axes.xaxis, metrics["tasks"])
    task_ticks(axes.yaxis, metrics["tasks"])
    axes.set_xlabel("tested on")
    axes.set_ylabel("after learning")
    figure.colorbar(image, ax=axes, label=word, shrink=0.8)
    return figure


def accuracy_over_time(metrics: Metrics) -> Figure:
    """Mean accuracy over the tasks seen so far, after each task."""
    names, word = metrics["tasks"], measured(metrics)
    if len(names) == 1:
        raise NoDataError(in_words("Accuracy over the tasks seen so far: there was only one.", word))
    seen = np.arange(1, len(names) + 1)
    figure, [axes] = new_figure(in_words("Average accuracy over the tasks seen so far", word), height=4.4)
    for evaluation in filter(metrics.__contains__, EVALUATIONS):
        R = np.array(metrics[evaluation]["accuracy_matrix"], dtype=float)
        style: dict[str, Any] = {"color": PALETTE[evaluation], "label": evaluation.replace("_", " ")}
        axes.plot(np.nanmean(R, axis=1), marker="o", markersize=4, **style)
    for baseline, result in metrics.get("baselines", {}).items():
        mean = np.cumsum(result["accuracy"]) / seen
        style = {"color": PALETTE.get(baseline, OTHER_COLOUR), "label": baseline.replace("_", " ")}
        axes.plot(mean, linestyle="--", **style)
    task_ticks(axes.xaxis, names)
    axes.set_xlabel("after learning")
    axes.set_ylabel(f"mean {word}")
    axes.set_ylim(min(0.0, axes.dataLim.ymin), 1.02)  # a correlation may be negative
    legend(axes)
    return figure


def task_accuracy(metrics: Metrics) -> Figure:
    """Accuracy on each task at the end of the run, the method beside its baselines."""
    series = {name: np.array([accuracies]) for name, accuracies in final_accuracies(metrics).items()}
    return _accuracy_bars("Accuracy on each task at the end", metrics["tasks"], series, measured(metrics))


def seeds_accuracy(runs: Sequence[Metrics]) -> Figure:
    """Accuracy on each task at the end, mean over runs, with the standard deviation as whiskers.

    Tasks are matched by name: seeds may have met them in different orders.
    """
    names = runs[0]["tasks"]
    finals = [(run["tasks"], final_accuracies(run)) for run in runs]
    series = {
        name: np.array([[dict(zip(tasks, final[name]))[task] for task in names] for tasks, final in finals])
        for name in finals[0][1]
    }
    title = f"Accuracy on each task at the end, mean of {len(runs)} seeds"
    return _accuracy_bars(title, names, series, measured(runs[0]))


def _accuracy_bars(title: str, names: Sequence[str], series: Mapping[str, np.ndarray], word: str) -> Figure:
    """Horizontal bars, so that names stay readable for any number of tasks. `series[name]` is `[runs, tasks]`."""
    row = 0.6 if len(names) <= 15 else 0.36  # inches a task
    figure, [axes] = new_figure(in_words(title, word), height=1.4 + row * len(names))
    thickness = 0.8 / len(series)
    for position, (name, values) in enumerate(series.items()):
        several = len(values) > 1
        axes.barh(
            np.arange(len(names)) + (position - (len(series) - 1) / 2) * thickness,
            values.mean(axis=0),
            height=0.9 * thickness,
            xerr=values.std(axis=0, ddof=1) if several else None,
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": INK},
            color=PALETTE.get(name, OTHER_COLOUR),
            label=name.replace("_", " "),
        )
    axes.grid(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    task_ticks(axes.yaxis, names, limit=len(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(min(0.0, *(float(values.min()) for values in series.values())), 1)
    axes.set_xlabel(word)
    legend(axes)
    return figure


def starts(metrics: Metrics) -> Figure:
    """The loss of each start that was considered, task by task, before any step; the chosen one is filled."""
    tasks = [(task["name"], task["start"]) for task in metrics["per_task"] if task.get("start")]
    judged = [(name, start) for name, start in tasks if len(start["considered"]) > 1]
    if not judged:
        raise NoDataError("Where tasks started: no task of this run had a choice.")
    figure, [axes] = new_figure("Where tasks started", height=1.4 + 0.32 * len(judged))
    markers = dict(zip(START_ROWS, "os^"))
    for row, (_, start) in enumerate(judged):
        for each in start["considered"]:
            if each["loss"] is None:
                continue
            color = PALETTE["task_adapter" if each["mixed_with"] else "live_queue"]
            face, size = (color, 9) if each == start["chosen"] else ("none", 6)
            axes.plot(each["loss"], row, markers[each["rows"]], color=color, markerfacecolor=face, markersize=size)
    for kind, marker in markers.items():
        axes.plot([], [], marker, color=INK, markerfacecolor="none", label=START_ROWS[kind])
    axes.plot([], [], "o", color=PALETTE["live_queue"], label="head in closed form, or none")
    axes.plot([], [], "o", color=PALETTE["task_adapter"], label="mixed with heads of tasks")
    axes.set_yticks(range(len(judged)), [label(name) for name, _ in judged])
    axes.set_ylim(len(judged) - 0.5, -0.5)
    axes.set_xlabel("loss on the task's examples before any step")
    legend(axes)
    return figure


def training_curves(metrics: Metrics) -> Figure:
    """Training loss, validation accuracy and retention loss along the steps of the whole stream.

    Steps in the curves count from the start of their task.
    """
    per_task = metrics["per_task"]
    validation = f"validation\n{measured(metrics)}"
    kinds = {"loss_curve": "training loss", "validation_curve": validation, "retention_curve": "retention"}
    kinds = {kind: name for kind, name in kinds.items() if any(task.get(kind) for task in per_task)}
    if not kinds:
        raise NoDataError("Training curves: the run recorded none.")
    lengths = [max([task.get("steps", 0), *(step for k in kinds for step, _ in task.get(k, ()))]) for task in per_task]
    ends = np.cumsum(lengths)
    starts = ends - lengths

    figure, panels = new_figure("Training, task after task", height=1.2 + 1.8 * len(kinds), panels=len(kinds))
    for axes, (kind, name) in zip(panels, kinds.items()):
        for task, start in zip(per_task, starts):
            curve = np.array(task.get(kind) or np.empty((0, 2)), dtype=float)
            axes.plot(start + curve[:, 0], curve[:, 1], color=PALETTE["task_adapter"], linewidth=1.2)
            if kind == "validation_curve":
                best = curve[curve[:, 0] == task.get("best_step")]
                axes.plot(start + best[:, 0], best[:, 1], "o", color=PALETTE["live_queue"], markersize=5)
        for end in ends[:-1]:
            axes.axvline(end, color=FAINT, linewidth=0.8, zorder=0)
        axes.set_ylabel(name)
        if kind != "retention_curve":  # the negative of a bound on mutual information: mostly below zero
            least = min(0.0, axes.dataLim.ymin) if kind == "validation_curve" else 0.0
            axes.set_ylim(least, 1.02 if kind == "validation_curve" else None)
    panels[-1].set_xlim(0, 1.01 * ends[-1])
    task_ticks(panels[-1].xaxis, metrics["tasks"], at=(starts + ends) / 2)
    panels[-1].set_xlabel("tasks in order, each as wide as its number of steps")
    return figure


def cost(metrics: Metrics) -> Figure:
    """Milliseconds of a training step and rows of the prefix, task by task, from zero."""
    per_task = metrics["per_task"]
    kinds = {"step_seconds": ("milliseconds\na step", 1000.0), "prefix_rows": ("prefix rows", 1.0)}
    kinds = {kind: how for kind, how in kinds.items() if any(task.get(kind) is not None for task in per_task)}
    if not kinds:
        raise NoDataError("Cost of a step: the run recorded neither times nor prefix sizes.")
    figure, panels = new_figure("Cost of a training step", height=0.9 + 1.8 * len(kinds), panels=len(kinds))
    for axes, (kind, (name, unit)) in zip(panels, kinds.items()):
        values = unit * np.array([task.get(kind) for task in per_task], dtype=float)
        axes.plot(values, color=PALETTE["task_adapter"], marker="o", markersize=4)
        start_y_at_zero(axes, np.nanmax(values))
        axes.set_ylabel(name)
    task_ticks(panels[-1].xaxis, metrics["tasks"])
    panels[-1].set_xlabel("while learning")
    return figure


def gate(metrics: Metrics) -> Figure:
    """The gate's alpha and tau in each layer, after some of the tasks; with a gate per head their range as a band."""
    gates = [(task["name"], task["gate"]) for task in metrics["per_task"] if task.get("gate")]
    if not gates:
        raise NoDataError("Gate: this run has none.")
    drawn = [gates[position] for position in evenly_spaced(len(gates), limit=4)]
    figure, panels = new_figure("The gate g(s) = s + α·σ(τ·s), layer by layer", height=5, panels=2)
    for axes, parameter, symbol in zip(panels, ("alpha", "tau"), "ατ"):
        for (name, values), color in zip(drawn, sequential_colours(len(drawn))):
            per_layer = np.array(values[parameter], dtype=float).T  # [heads, layers]
            band(axes, np.arange(per_layer.shape[1]), per_layer, color, f"after {label(name)}")
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylabel(symbol, fontsize=12, rotation=0, labelpad=10)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.9), max(high, 1.1))  # or a drift of a thousandth would fill the plot
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("layer (of those with a prefix)")
    legend(panels[0])
    return figure


def _evictions(metrics: Metrics, record: str, title: str) -> list[tuple[str, dict[str, Any]]]:
    """The name of each task that had to make room, with its eviction, where that holds the `record`."""
    evictions = [(task["name"], task.get("eviction") or {}) for task in metrics["per_task"]]
    found = [(name, made) for name, made in evictions if made.get(record)]
    if not found:
        raise NoDataError(f"{title}: no eviction on record; the queue makes room only once it overflows.")
    return found


def spectrum(metrics: Metrics) -> Figure:
    """Singular values of the queue at some of its evictions: mean over layers, lowest to highest as a band."""
    evictions = _evictions(metrics, "spectrum", "Spectrum of the queue")
    drawn = [evictions[position] for position in evenly_spaced(len(evictions), limit=6)]
    figure, [axes] = new_figure("Spectrum of the queue when it overflows", height=4)
    largest = 0.0
    for (name, made), color in zip(drawn, sequential_colours(len(drawn))):
        values = pad_rows(made["spectrum"])
        band(axes, np.arange(1, values.shape[1] + 1), values, color, f"before {label(name)}")
        largest = max(largest, np.nanmax(values))
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-6 * largest))  # below that it is rounding
    for kept in sorted({made["kept"] for _, made in drawn if made["policy"] == "pca"}):
        axes.axvline(kept + 0.5, color=INK, linewidth=1, linestyle="--")
        axes.annotate(
            "kept ◂ ▸ dropped", (kept + 0.5, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top",
            fontsize=9, color=INK, backgroundcolor="white",
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("component")
    axes.set_ylabel("singular value (log)")
    legend(axes)
    return figure


def energy(metrics: Metrics) -> Figure:
    """Share of the queue's energy that each eviction kept and its effective rank: mean over layers, with the range."""
    evictions = _evictions(metrics, "energy_kept", "Energy kept at each eviction")
    x = np.arange(len(evictions))
    figure, [kept, rank] = new_figure("What each eviction kept", height=4.6, panels=2)
    band(kept, x, np.array([made["energy_kept"] for _, made in evictions]).T, PALETTE["task_adapter"])
    kept.set_ylim(0, 1.05)
    kept.set_ylabel("energy kept")
    ranks = np.array([made["effective_rank"] for _, made in evictions]).T
    rows = [made["kept"] for _, made in evictions]
    band(rank, x, ranks, PALETTE["task_adapter"], "effective rank")
    lone = "_" if len(rows) == 1 else None  # a line through one point is invisible
    rank.plot(x, rows, color=INK, linestyle="--", marker=lone, linewidth=1, label="rows kept")
    start_y_at_zero(rank, max(ranks.max(), max(rows)))
    rank.set_ylabel("effective rank")
    legend(rank)
    task_ticks(rank.xaxis, [name for name, _ in evictions])
    rank.set_xlabel("eviction before learning")
    return figure


def row_weights(metrics: Metrics) -> Figure:
    """How strongly each old row is reweighted for each task: mean |W| over features and layers, 1 is untouched."""
    per_task = metrics["per_task"]
    weights = pad_rows([_over_layers(task.get("row_weights") or []) for task in per_task])
    if not weights.size:
        raise NoDataError("Reweighting of old rows: there is none, or no task had old rows before it.")
    height = min(2 + 0.4 * len(weights), 6.5)
    figure, [axes] = new_figure("How each task reweights the old rows of the queue", height)
    reach = float(np.clip(np.nanmax(np.abs(np.log2(weights.clip(min=1e-9)))), 0.2, 4))  # in doublings
    scale = LogNorm(vmin=2**-reach, vmax=2**reach, clip=True)
    image = axes.imshow(weights, norm=scale, cmap="PuOr_r", aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.set_facecolor("#eeeeee")  # no such row; white is the middle of the scale
    task_ticks(axes.yaxis, metrics["tasks"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("old row")
    axes.set_ylabel("while learning")
    ticks = [2**-reach, 2 ** (-reach / 2), 1, 2 ** (reach / 2), 2**reach]
    bar = figure.colorbar(image, ax=axes, label="mean |W|", ticks=FixedLocator(ticks), format="%.2f")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return figure


def _over_layers(rows: Sequence[Sequence[float]]) -> list[float]:
    return np.mean(np.array(rows, dtype=float), axis=0).tolist() if any(map(len, rows)) else []
