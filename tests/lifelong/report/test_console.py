import io

import pytest
from rich.console import Console

from qtuning_fast.lifelong.report.console import summary_table


def printed(metrics):
    console = Console(width=80, file=io.StringIO())
    console.print(summary_table(metrics))
    return console.file.getvalue()


def test_every_task_and_the_averages_are_there(make_metrics):
    metrics = make_metrics(5)
    text = printed(metrics)
    for name in metrics["tasks"]:
        assert name in text
    for position, accuracy in enumerate(metrics["live_queue"]["accuracy_matrix"][-1]):
        [line] = [line for line in text.splitlines() if metrics["tasks"][position] in line]
        assert f"{accuracy:.3f}" in line
    [average] = [line for line in text.splitlines() if "average accuracy" in line]
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
    metrics = make_metrics(2)
    for task in metrics["per_task"]:
        task["metric"] = "micro_f1"
    text = printed(metrics)
    assert "average micro-F1" in text and "ccuracy" not in text
