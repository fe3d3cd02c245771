"""What a run learned, as a table for the terminal."""

from rich.table import Table
from rich.text import Text

from qtuning_fast.lifelong.metrics import MEASURES, Metrics, final_accuracies, results


def summary_table(metrics: Metrics) -> Table:
    """Accuracy on each task at the end of the run, by evaluation and baseline, and what it sums up to.

    Fits 80 columns: long task names are cut.
    """
    final = final_accuracies(metrics)
    table = Table(title="Accuracy at the end of the stream")
    table.add_column("task", no_wrap=True, overflow="ellipsis", max_width=28)
    for name in final:
        table.add_column(name.replace("_", " "), justify="right")
    for position, task in enumerate(metrics["tasks"]):
        # Text, not str: a name such as "[bold]" is a name, not markup
        table.add_row(Text(task), *(_number(column[position]) for column in final.values()))
    table.add_section()

    for measure in MEASURES:
        values = [result.get(measure) for result in results(metrics).values()]
        table.add_row(measure.replace("_", " "), *map(_number, values), style="bold")
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
