"""The results of a run as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from qtuning_fast.lifelong.metrics import (
    EVALUATIONS,
    MEASURES,
    Metrics,
    evaluations_and_baselines,
    final_accuracies,
    in_words,
    measured,
)


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


def seeds_table(summary: Mapping[str, Any]) -> Table:
    """Mean and sample standard deviation over several seeds, from `mean_and_spread`."""
    table = Table(title="Mean ± standard deviation over the seeds")
    table.add_column("")
    for measure in MEASURES:
        table.add_column(in_words(measure, summary.get("metric", "accuracy")), justify="right")
    for name, spreads in {**{name: summary[name] for name in EVALUATIONS}, **summary["baselines"]}.items():
        table.add_row(name.replace("_", " "), *(_spread(spreads.get(measure)) for measure in MEASURES))
    return table


def _spread(spread: Mapping[str, Any] | None) -> str:
    return "–" if spread is None else f"{_number(spread['mean'])} ± {_number(spread['std'])}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
