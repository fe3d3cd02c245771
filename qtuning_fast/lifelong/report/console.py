"""The results of a run as tables for the terminal, each at most 80 columns wide."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

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
    unnamed_evaluations,
    unnamed_results,
)
from qtuning_fast.lifelong.scores import WORDS


def run_tables(metrics: Metrics) -> Group:
    """How good a run is when the task is named, and below it, where that was measured, when it is not."""
    tables = [summary_table(metrics)]
    if unnamed_results(metrics):
        tables.append(unnamed_table(metrics))
    return Group(*tables)


def seeds_tables(summary: Mapping[str, Any]) -> Group:
    """The same as mean and sample standard deviation over several seeds, from `mean_and_spread`."""
    tables = [seeds_table(summary)]
    if "class_incremental" in summary:
        tables.append(unnamed_seeds_table(summary))
    return Group(*tables)


def scores_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What the stored adapters reach on test examples, one row a task.

    Args:
        rows: `task`, `examples`, `measure` and `score` of each task; and, if tasks were inferred too, what
            `SavedRun.score_unnamed` returns.
    """
    words = [WORDS[row["measure"]] for row in rows]
    several, unnamed = len(set(words)) > 1, all("task_found" in row for row in rows)
    table = Table("task", "examples", *(["measure", "score"] if several else words[:1]))
    for heading in ("task found", "not named", "known") if unnamed else ():
        table.add_column(heading)
    for word, row in zip(words, rows):
        numbers = [row["score"], *((row["task_found"], row["accuracy"], row["known"]) if unnamed else ())]
        table.add_row(Text(row["task"]), str(row["examples"]), *([word] if several else []), *map(_number, numbers))
    return table


def labels_table(examples: int, found: Mapping[str, float]) -> Table:
    """How well examples of any tasks are answered, from `SavedRun.score_by_label`."""
    table = Table("examples", "right label", "of a known task")
    table.add_row(str(examples), _number(found["accuracy"]), _number(found["known"]))
    return table


def summary_table(metrics: Metrics) -> Table:
    """Accuracy on each task at the end of the run, by evaluation and baseline, with the summary measures.

    The table fits 80 columns; long task names are cut.
    """
    final, word = final_accuracies(metrics), measured(metrics)
    table = Table(title=in_words("Accuracy at the end of the stream", word))
    table.add_column("task", no_wrap=True, overflow="ellipsis", max_width=28)
    for name in final:
        table.add_column(name.replace("_", " "), justify="right")
    for position, task in enumerate(metrics["tasks"]):
        # Text, not str: a name such as "[bold]" is a name, not markup
        table.add_row(Text(task), *(_number(column[position]) for column in final.values()))
    table.add_section()

    for measure in MEASURES:
        values = [result.get(measure) for result in evaluations_and_baselines(metrics).values()]
        table.add_row(in_words(measure, word), *map(_number, values), style="bold")
    return table


def unnamed_table(metrics: Metrics) -> Table:
    """How good the answers are without the task's name, those with it in the last row; below it unknown tasks."""
    block = metrics["class_incremental"]
    table = _table_of_measures("Accuracy when the task is not named", UNNAMED_MEASURES, number="0.000")
    mine = metrics["config"].get("answered_by")
    for name, result in unnamed_results(metrics).items():
        found = [_number(result.get(measure)) for measure in UNNAMED_MEASURES]
        table.add_row(name.replace("_", " "), *found, style="bold" if name == mine else None)
    named = named_summary(metrics)
    if named:
        table.add_section()
        table.add_row("adapters, task named", *(_number(named.get(measure)) for measure in UNNAMED_MEASURES))
    numbers = {name: _number(value) for name, value in block["unknown"].items() if isinstance(value, int | float)}
    table.caption = _no_known_task(numbers, _number(block["calibration"]["error"]))
    return table


def unnamed_seeds_table(summary: Mapping[str, Any]) -> Table:
    """How good the answers are without the task's name, over several seeds."""
    block = summary["class_incremental"]
    measures = [measure for measure in UNNAMED_MEASURES if measure != "label_accuracy"]  # 80 columns have no room
    table = _table_of_measures("The same when the task is not named", measures, number="0.000 ± 0.000")
    for name, spreads in (unnamed_evaluations(block) | block["baselines"]).items():
        table.add_row(name.replace("_", " "), *(_spread(spreads.get(measure)) for measure in measures))
    numbers = {name: _spread(spread) for name, spread in block["unknown"].items() if spread}
    numbers["false_alarm_rate"] = _number(block["unknown"]["false_alarm_rate"]["mean"])  # promised, hence all alike
    table.caption = _no_known_task(numbers, _spread(block["calibration"]["error"]))
    return table


def seeds_table(summary: Mapping[str, Any]) -> Table:
    """Mean and sample standard deviation over several seeds, from `mean_and_spread`."""
    table = Table(title="Mean ± standard deviation over the seeds")
    table.add_column("")
    for measure in MEASURES:
        table.add_column(in_words(measure, summary.get("metric", "accuracy")), justify="right")
    for name, spreads in {**{name: summary[name] for name in EVALUATIONS}, **summary["baselines"]}.items():
        table.add_row(name.replace("_", " "), *(_spread(spreads.get(measure)) for measure in MEASURES))
    return table


def _table_of_measures(title: str, measures: Iterable[str], number: str) -> Table:
    """An empty table with a column for each measure without the task's name, wide enough for a `number`."""
    table = Table(title=title, caption_justify="left")
    table.add_column("", min_width=len("nearest"))
    for measure in measures:
        heading = UNNAMED_MEASURES[measure]
        least = max(len(part) for part in [number, *heading.split()])  # headings break between words, numbers never
        table.add_column(heading, justify="right", width=least)
    return table


def _no_known_task(unknown: Mapping[str, str], calibration_error: str) -> str:
    """What the lines below a table say, from numbers as they are written; what is not known is left out."""
    lines = []
    if "false_alarms" in unknown:
        lines.append(
            f"Said to be of no known task: {unknown['false_alarms']} of the known tasks' examples\n"
            f"({unknown['false_alarm_rate']} promised)"
            + (f", {unknown['mean_detected']} of a held-out task's" if "mean_detected" in unknown else "")
        )
    if "mean_auroc" in unknown:
        lines.append(f"AUROC of held-out tasks: {unknown['mean_auroc']}")
    return "\n".join([*lines, f"Calibration error of the task's probability: {calibration_error}"])


def _spread(spread: Mapping[str, Any] | None) -> str:
    return "–" if spread is None else f"{_number(spread['mean'])} ± {_number(spread['std'])}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
