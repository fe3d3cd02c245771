import io
import math

import pytest
from rich.console import Console

from qtuning_fast.lifelong.metrics import mean_and_spread
from qtuning_fast.lifelong.report.console import run_tables, seeds_tables


def printed(metrics, tables=run_tables):
    console = Console(width=80, file=io.StringIO())
    console.print(tables(metrics))
    return console.file.getvalue()


def rows(text):
    """The cells of the lines below a table's heading, by the first; a later row of the same name wins."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return {cells[0]: cells[1:] for cells in lines}


def test_every_task_and_the_averages_are_there(make_metrics):
    metrics = make_metrics(5)
    text = printed(metrics)
    for name in metrics["tasks"]:
        assert name in text
    for position, accuracy in enumerate(metrics["live_queue"]["accuracy_matrix"][-1]):
        [line] = [line for line in text.splitlines() if metrics["tasks"][position] in line]
        assert f"{accuracy:.3f}" in line
    [average] = [line for line in text.splitlines() if "│ average accuracy" in line]
    for result in (metrics["task_adapter"], metrics["live_queue"], metrics["baselines"]["linear_probe"]):
        assert f"{result['average_accuracy']:.3f}" in average


@pytest.mark.parametrize("name", ["x" * 200, "[bold]not markup[/bold]", "[/red]"])
def test_any_name_fits_eighty_columns(make_metrics, name):
    metrics = make_metrics(2)
    metrics["tasks"][0] = name
    text = printed(metrics)
    assert max(map(len, text.splitlines())) <= 80
    assert name[:10] in text


def test_a_run_without_baselines_or_live_queue(make_metrics):
    metrics = make_metrics(2)
    del metrics["baselines"], metrics["live_queue"]
    text = printed(metrics)
    assert "task adapter" in text
    assert "live queue" not in text


def test_measures_other_than_accuracy_have_their_names(make_metrics):
    metrics = make_metrics(2, class_incremental=False)
    for task in metrics["per_task"]:
        task["metric"] = "micro_f1"
    text = printed(metrics)
    assert "average micro-F1" in text and "ccuracy" not in text
    for task in metrics["per_task"]:
        task["metric"] = "pearson"
    for text in (printed(metrics), printed(mean_and_spread([metrics, metrics]), seeds_tables)):
        assert "correlation" in text
        assert max(map(len, text.splitlines())) <= 80 and "…" not in text


@pytest.mark.parametrize("tasks", [1, 5, 60])
def test_below_it_stand_the_answers_without_the_name(make_metrics, tasks):
    metrics = make_metrics(tasks)
    text = printed(metrics)
    block, below = metrics["class_incremental"], rows(text.partition("when the task is not named")[2])
    measures = ("task_found", "average_accuracy", "cumulative_average_accuracy", "forgetting", "label_accuracy")
    for name, result in {
        "adapters": block["adapters"],
        "closed form": block["closed_form"],
        "nearest class mean": block["baselines"]["nearest_class_mean"],
        "joint regression": block["baselines"]["joint_regression"],
    }.items():
        assert below[name] == [f"{result[measure]:.3f}" if measure in result else "–" for measure in measures]
    named = below["adapters, task named"]
    R = metrics["task_adapter"]["accuracy_matrix"]
    assert named[1] == f"{metrics['task_adapter']['average_accuracy']:.3f}"
    assert float(named[2]) == pytest.approx(
        sum(sum(row[: i + 1]) / (i + 1) for i, row in enumerate(R)) / tasks, abs=6e-4
    )
    assert max(map(len, text.splitlines())) <= 80
    assert "0.013 of the known tasks' examples" in text and "(0.010 promised)" in text
    assert ("AUROC" in text) is (tasks > 1)
    if tasks > 1:
        assert f"{block['unknown']['mean_detected']:.3f} of a held-out task's" in text


def test_a_run_of_an_earlier_version_has_one_table(make_metrics):
    text = printed(make_metrics(3, class_incremental=False))
    assert "average accuracy" in text and "not named" not in text
    text = printed(mean_and_spread([make_metrics(3, class_incremental=False)]), seeds_tables)
    assert "average accuracy" in text and "not named" not in text


def test_without_a_threshold_no_alarm_is_counted(make_metrics):
    metrics = make_metrics(3)
    silent = {"threshold": None, "false_alarms": None, "detected": None, "mean_detected": None}
    metrics["class_incremental"]["unknown"].update(silent)
    text = printed(metrics)
    assert "promised" not in text and "AUROC" in text


def test_several_seeds_have_both_tables_with_spreads(make_metrics):
    runs = [make_metrics(4, seed) for seed in (0, 1)]
    text = printed(mean_and_spread(runs), seeds_tables)
    above, _, below = text.partition("not named")
    for part, first, second, place in (
        (above, *(run["task_adapter"]["average_accuracy"] for run in runs), "task adapter"),
        (below, *(run["class_incremental"]["adapters"]["average_accuracy"] for run in runs), "adapters"),
    ):
        spread = f"{(first + second) / 2:.3f} ± {abs(first - second) / math.sqrt(2):.3f}"
        assert spread in rows(part)[place]
    assert max(map(len, text.splitlines())) <= 80
    assert "0.013 ± 0.000 of the known tasks' examples" in text and "(0.010 promised)" in text
