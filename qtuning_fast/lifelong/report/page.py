"""Write the report of a run: one HTML file with tables and plots, without scripts, that opens from disk."""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from qtuning_fast.lifelong.metrics import (
    EVALUATIONS,
    MEASURES,
    UNNAMED_MEASURES,
    Metrics,
    evaluations_and_baselines,
    final_accuracies,
    in_words,
    measured,
    named_summary,
    start_in_words,
    unnamed_results,
)
from qtuning_fast.lifelong.report import class_incremental_plots, plots
from qtuning_fast.lifelong.report.samples import FILE as SAMPLES
from qtuning_fast.lifelong.scores import WORDS


@dataclass(frozen=True)
class Plot:
    """One plot of the report: the name of its file, how to read it, and the function that draws it."""

    name: str
    caption: str
    draw: Callable[[Metrics], Figure]


PLOTS: dict[str, tuple[Plot, ...]] = {
    "Accuracy": (
        Plot(
            "accuracy-over-time",
            "Each point is the mean over the tasks learned up to there. A line moves because a task was forgotten or "
            "because the next one is harder or easier; the dashed probe moves for the second reason only.",
            plots.accuracy_over_time,
        ),
        Plot(
            "accuracy-by-task",
            "One group of bars per task, after the whole stream: where the method beats a linear probe on the frozen "
            "base model, and where it does not.",
            plots.task_accuracy,
        ),
        Plot(
            "accuracy-matrix-task-adapter",
            "Read down a column to follow one task. Every column is constant, since a stored adapter never changes.",
            partial(plots.accuracy_matrix, evaluation="task_adapter"),
        ),
        Plot(
            "accuracy-matrix-live-queue",
            "Read down a column to follow one task: where the numbers fall, the queue is forgetting it.",
            partial(plots.accuracy_matrix, evaluation="live_queue"),
        ),
    ),
    "Without the task's name": (
        Plot(
            "accuracy-without-the-task",
            "Each point is the mean over the tasks learned up to there; an answer is right when task and class are. "
            "Lines tend to fall because there is ever more to choose from. The gap between the two blue lines is what "
            "inferring the task costs; the diamond, where there is one, has seen the examples of all tasks at once.",
            class_incremental_plots.unnamed_accuracy,
        ),
        Plot(
            "task-confusion",
            "Read along a row: where the test examples of one task went. The diagonal is the share whose task was "
            "found. Colours grow with the root of a share, so that small ones show; shares below 0.005 have no number.",
            class_incremental_plots.confusion,
        ),
        Plot(
            "task-confidence",
            "Points on the dotted line: where the model says 0.8, the task is found in 0.8 of the examples. Below it "
            "the model is too sure, above it too modest. Whiskers are 95% intervals: a point of few examples says "
            "little. The calibration error is the mean distance from the line, by number of examples.",
            class_incremental_plots.reliability,
        ),
        Plot(
            "no-known-task",
            "Each task in turn is taken out of what is known. Left: the chance that one of its examples looks stranger "
            "than one of another task; 1 tells them apart, 0.5 is a guess. Right, where there is a threshold: the "
            "share of its examples said to be of no known task; lines: the share of the known tasks', by mistake.",
            class_incremental_plots.no_known_task,
        ),
    ),
    "Training": (
        Plot(
            "starts",
            "Before a task trains, each start is judged on the task's own examples, with a head that was not made from "
            "them. The filled one was chosen: the first that was tried, mostly random rows, unless another's loss is "
            "less by more than one standard error.",
            plots.starts,
        ),
        Plot(
            "training-curves",
            "The loss should fall within each task and the validation accuracy rise; a dot marks the step whose "
            "state was kept. Retention loss, where there is one, begins with the first eviction; lower keeps more.",
            plots.training_curves,
        ),
        Plot(
            "cost",
            "Rows grow until the queue is full, or with every task if it never evicts. The first eviction switches "
            "memory retention on, which runs every batch twice. From there on both lines should be flat: a later task "
            "costs no more than an earlier one.",
            plots.cost,
        ),
    ),
    "Gate": (
        Plot(
            "gate",
            "Both parameters start at 1 (dotted). Lines that lie on each other mean that the gate no longer moved; "
            "with a gate per head the line is the mean over heads and the band their range.",
            plots.gate,
        ),
    ),
    "Queue": (
        Plot(
            "queue-spectrum",
            "How much each component of the queue carries, largest first: the steeper the fall, the less PCA loses "
            "with the components right of its dashed line. Line: mean over layers; band: their range.",
            plots.spectrum,
        ),
        Plot(
            "queue-energy",
            "Energy kept is the share of the rows' squared norm that survived; the effective rank says how many rows "
            "the queue really uses of those it keeps. Line: mean over layers; band: their range.",
            plots.energy,
        ),
        Plot(
            "row-weights",
            "1 leaves an old row as it was; above 1 (orange) a task leans on it, below 1 (purple) it turns it down. "
            "Grey: the queue had no such row yet.",
            plots.row_weights,
        ),
    ),
}


TABLES = {"Without the task's name": "class_incremental.html.j2"}  # a section's template, in front of its plots


def write_report(metrics: Metrics, folder: Path) -> Path:
    """Write `folder/report.html`, and its plots also as `folder/plots/*.png`.

    Args:
        metrics: the content of metrics.json. The report says which plots are missing and why.
        folder: the folder of the run; made if it does not exist.

    Returns:
        The path of the report.
    """
    word = measured(metrics)
    sections = {}
    for heading, plots_of_section in PLOTS.items():
        pictures = [
            _render_plot(plot.name, in_words(plot.caption, word), partial(plot.draw, metrics), folder)
            for plot in plots_of_section
        ]
        sections[in_words(heading, word)] = {"table": TABLES.get(heading), "pictures": _say_once(pictures)}
    compared = evaluations_and_baselines(metrics)
    transfers_forward = any(result.get("forward_transfer") is not None for result in compared.values())
    return _render_page(
        "page.html.j2",
        folder,
        word,
        metrics=metrics,
        measures=(*MEASURES, "forward_transfer") if transfers_forward else MEASURES,
        results=compared,
        final=final_accuracies(metrics),
        settings=list(_flatten(metrics.get("config", {}))),
        sections=sections,
        unnamed=unnamed_results(metrics),
        unnamed_measures=UNNAMED_MEASURES,
        named=named_summary(metrics),
        confusions=class_incremental_plots.largest_confusions(metrics),
        samples=_samples(folder),
    )


def write_seeds_report(runs: Sequence[Metrics], summary: Mapping[str, Any], folder: Path) -> Path:
    """Write `folder/report.html` for several seeds; it links to the `seed-<seed>/report.html` of each.

    Args:
        runs: the metrics of each seed.
        summary: the result of `mean_and_spread`.
        folder: the folder above those of the seeds; made if it does not exist.

    Returns:
        The path of the report.
    """
    caption = "Bars are means over the seeds, whiskers one sample standard deviation to either side."
    picture = _render_plot("accuracy-by-task", caption, partial(plots.seeds_accuracy, runs), folder)
    rows = {name: summary[name] for name in EVALUATIONS} | summary["baselines"]
    word = measured(runs[0])
    return _render_page(
        "seeds_report.html.j2",
        folder,
        word,
        runs=runs,
        measures=MEASURES,
        rows=rows,
        picture=picture,
        class_incremental=summary.get("class_incremental"),
        unnamed=unnamed_results(summary),
        unnamed_measures=UNNAMED_MEASURES,
    )


def _say_once(pictures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pictures of a section, where several that are missing for one reason share one sentence."""
    said: list[dict[str, Any]] = []
    for picture in pictures:
        if not picture["missing"] or picture not in said:
            said.append(picture)
    return said


def _render_plot(name: str, caption: str, draw: Callable[[], Figure], folder: Path) -> dict[str, Any]:
    """One plot for the templates: embedded, or a sentence that says why it is missing."""
    target = folder / "plots" / f"{name}.png"
    try:
        figure = draw()
    except plots.NoDataError as reason:
        target.unlink(missing_ok=True)  # left by an earlier report
        return {"missing": str(reason)}
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(buffer.getvalue())
    width, height = figure.get_size_inches() * 96  # CSS pixels to an inch
    return {
        "missing": None,
        "data": base64.b64encode(buffer.getvalue()).decode("ascii"),
        "width": round(width),
        "height": round(height),
        "title": figure.get_suptitle(),
        "caption": caption,
    }


def _samples(folder: Path) -> dict[str, Any] | None:
    """The picture of training images for the template; None for a run without."""
    file = folder / SAMPLES
    if not file.is_file():
        return None
    with Image.open(file) as picture:
        width, height = picture.size
    scale = 96 / picture.info.get("dpi", (144, 144))[0]
    return {
        "missing": None,
        "data": base64.b64encode(file.read_bytes()).decode("ascii"),
        "width": round(width * scale),
        "height": round(height * scale),
        "title": "Training images of each task",
        "caption": "Some images that each class is learned from.",
    }


def _render_page(template: str, folder: Path, word: str, **content: Any) -> Path:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of tasks and labels come from users
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value, digits=3: "–" if value is None else f"{value:.{digits}f}"
    environment.filters["words"] = lambda name: in_words(name, word)
    environment.filters["start"] = start_in_words
    environment.filters["measure"] = WORDS.__getitem__
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "report.html"
    target.write_text(environment.get_template(template).render(content, word=word), encoding="utf-8")
    return target


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names and values."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
