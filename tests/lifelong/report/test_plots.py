"""The pictures of a run, one by one."""

import numpy as np
import pytest
from matplotlib.container import BarContainer

from qtuning_fast.lifelong.report import plots


def test_tasks_without_some_curves_are_drawn_all_the_same(make_metrics):
    metrics = make_metrics(6)
    for key in ("loss_curve", "validation_curve", "step_seconds", "gate", "row_weights"):
        del metrics["per_task"][2][key]
    metrics["per_task"][3]["loss_curve"] = [[10, None], [20, 0.5]]
    for draw in (plots.training_curves, plots.cost, plots.gate, plots.row_weights):
        assert draw(metrics).axes


def test_a_step_costs_from_zero(make_metrics):
    for axes in plots.cost(make_metrics(5)).axes:
        assert axes.get_ylim()[0] == 0


def test_seeds_match_tasks_by_name(make_metrics):
    first, second = make_metrics(2, 0), make_metrics(2, 0)
    second["tasks"] = second["tasks"][::-1]
    second["task_adapter"]["accuracy_matrix"][-1].reverse()
    second["live_queue"]["accuracy_matrix"][-1].reverse()
    second["baselines"]["linear_probe"]["accuracy"].reverse()
    [axes] = plots.seeds_accuracy([first, second]).axes
    adapter, *_ = (container for container in axes.containers if isinstance(container, BarContainer))
    assert [bar.get_width() for bar in adapter] == pytest.approx(first["task_adapter"]["accuracy_matrix"][-1])


def test_the_matrix_shows_every_accuracy_that_there_is(make_metrics):
    metrics = make_metrics(4)
    axes, _ = plots.accuracy_matrix(metrics, "live_queue").axes
    shown = sorted(text.get_text() for text in axes.texts)
    matrix = metrics["live_queue"]["accuracy_matrix"]
    assert shown == sorted(f"{value:.2f}" for row in matrix for value in row if value is not None)


def test_curves_stand_behind_each_other(make_metrics):
    metrics = make_metrics(3)
    loss, *_ = plots.training_curves(metrics).axes
    starts = [line.get_xdata()[0] for line in loss.lines[:3]]
    ends = np.cumsum([task["steps"] for task in metrics["per_task"]])
    assert starts == [10, 10 + ends[0], 10 + ends[1]]


def test_the_gate_is_drawn_from_its_parameters(make_metrics):
    metrics = make_metrics(2)
    alpha, tau = plots.gate(metrics).axes
    for axes, name in ((alpha, "alpha"), (tau, "tau")):
        expected = np.mean(metrics["per_task"][0]["gate"][name], axis=1)
        assert np.allclose(axes.lines[0].get_ydata(), expected)


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (plots.accuracy_over_time, "there was only one"),
        (plots.spectrum, "no eviction on record"),
        (plots.energy, "no eviction on record"),
        (plots.gate, "this run has none"),
        (plots.row_weights, "no task had old rows"),
        (lambda metrics: plots.accuracy_matrix(metrics, "live_queue"), "one task makes one number"),
    ],
)
def test_a_picture_without_data_says_why(draw, reason, make_metrics):
    with pytest.raises(plots.NoDataError, match=reason):
        draw(make_metrics(1, gate=False))


def test_starts_are_drawn_for_tasks_that_had_a_choice(make_metrics):
    metrics = make_metrics(5)
    axes = plots.starts(metrics).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [task["name"] for task in metrics["per_task"][1:]]
    points = [line for line in axes.lines if len(line.get_xdata())]
    assert len(points) == 4 * 4 and sum(line.get_markerfacecolor() != "none" for line in points) == 4
    chosen = {task["start"]["chosen"]["loss"] for task in metrics["per_task"][1:]}
    assert {float(line.get_xdata()[0]) for line in points if line.get_markerfacecolor() != "none"} == chosen
    for task in metrics["per_task"]:
        task["start"]["considered"] = task["start"]["considered"][:1]
    with pytest.raises(plots.NoDataError, match="no task of this run had a choice"):
        plots.starts(metrics)
