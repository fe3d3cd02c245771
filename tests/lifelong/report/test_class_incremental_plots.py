"""The pictures of answers without the task's name, read back from the figure."""

import io
import math

import numpy as np
import pytest
from matplotlib.container import BarContainer

from qtuning_fast.lifelong.report import class_incremental_plots as plots
from qtuning_fast.lifelong.report.plots import NoDataError

ALL = (plots.unnamed_accuracy, plots.confusion, plots.reliability, plots.no_known_task)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tasks", [2, 5, 15, 60])
@pytest.mark.parametrize("draw", ALL)
def test_any_number_of_tasks_with_any_name_is_drawn_inside_its_figure(make_metrics, tasks, draw):
    metrics = make_metrics(tasks)
    metrics["tasks"] = [f"$x_{place}$ <b>{'long ' * 20}</b>" for place in range(tasks)]
    figure = draw(metrics)
    figure.savefig(io.BytesIO(), format="png")
    width, height = figure.bbox.size
    shown = [text for axes in figure.axes for text in (axes.xaxis.label, axes.yaxis.label, *axes.get_yticklabels())]
    for text in [*shown, figure._suptitle, *(text for axes in figure.axes for text in axes.get_xticklabels())]:
        box = text.get_window_extent()
        assert -2 <= box.x0 and box.x1 <= width + 2 and -2 <= box.y0 and box.y1 <= height + 2, text


@pytest.mark.parametrize("draw", ALL)
def test_there_are_no_pictures_without_data(make_metrics, draw):
    with pytest.raises(NoDataError, match="not evaluated without the names"):
        draw(make_metrics(5, class_incremental=False))
    with pytest.raises(NoDataError, match="one task only"):
        draw(make_metrics(1))


def test_lines_are_means_over_the_tasks_so_far(make_metrics):
    metrics = make_metrics(4)
    [axes] = plots.unnamed_accuracy(metrics).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    block = metrics["class_incremental"]
    for label, result in {
        "adapters, task named": metrics["task_adapter"],
        "adapters, task inferred": block["adapters"],
        "closed form": block["closed_form"],
        "nearest class mean": block["baselines"]["nearest_class_mean"],
    }.items():
        means = [sum(row[: i + 1]) / (i + 1) for i, row in enumerate(result["accuracy_matrix"])]
        assert lines[label] == pytest.approx(np.array([[i, mean] for i, mean in enumerate(means)]))
    joint = block["baselines"]["joint_regression"]["average_accuracy"]
    assert lines["joint regression"] == pytest.approx(np.array([[3, joint]]))
    assert len(lines) == 5


@pytest.mark.parametrize("tasks", [5, 15, 60])
def test_the_confusion_shows_its_shares(make_metrics, tasks):
    metrics = make_metrics(tasks)
    axes, bar = plots.confusion(metrics).axes
    shares = np.array(metrics["class_incremental"]["confusion"])
    [image] = axes.images
    assert np.array_equal(image.get_array(), shares)
    assert image.norm(0.04) == pytest.approx(0.2), "a root, which the colour bar names"
    assert bar.get_ylabel() == "share of the row"
    written = {(*map(round, text.get_position()[::-1]),): text.get_text() for text in axes.texts}
    expected = {(i, j): f"{shares[i, j]:.2f}" for i, j in np.argwhere(shares >= 0.005).tolist()}
    assert written == (expected if tasks <= 15 else {})


def test_the_largest_confusions_come_first(make_metrics):
    metrics = make_metrics(3)
    a, b, c = metrics["tasks"]
    metrics["class_incremental"]["confusion"] = [[0.9, 0.1, 0.0], [0.3, 0.5, 0.2], [0.001, 0, 0.999]]
    assert plots.largest_confusions(metrics) == [(b, a, 0.3), (b, c, 0.2), (a, b, 0.1)]
    assert plots.largest_confusions(metrics, most=1) == [(b, a, 0.3)]
    assert plots.largest_confusions(make_metrics(1)) == []
    assert plots.largest_confusions(make_metrics(3, class_incremental=False)) == []


def test_the_reliability_diagram_shows_shares_and_counts(make_metrics):
    metrics = make_metrics(3)
    bins = [[0.349, 0.2, 5], [0.41, 0.5, 100], [1.0, 1.0, 395]]
    metrics["class_incremental"]["calibration"] = {"error": 0.0417, "temperature": 1.2, "bins": bins}
    figure = plots.reliability(metrics)
    assert "calibration error 0.042" in figure.get_suptitle()
    share, count = figure.axes
    points = next(line for line in share.lines if len(line.get_xdata()) == 3)
    assert points.get_xydata().tolist() == [[0.349, 0.2], [0.41, 0.5], [1.0, 1.0]]
    [bars] = [container for container in count.containers if isinstance(container, BarContainer)]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    assert centres == pytest.approx([0.35, 0.45, 0.95]), "each in its own bin of ten"
    assert [bar.get_height() for bar in bars] == [5, 100, 395]
    assert [text.get_text() for text in count.texts] == ["5", "100", "395"]


def test_whiskers_are_wilsons_interval(make_metrics):
    metrics = make_metrics(3)
    metrics["class_incremental"]["calibration"]["bins"] = [[0.5, 0.5, 100], [0.95, 1.0, 20]]
    share, _ = plots.reliability(metrics).axes
    [whiskers] = [collection for collection in share.collections if len(collection.get_segments()) == 2]
    [(_, low), (_, high)], [(_, low_of_all), (_, high_of_all)] = whiskers.get_segments()
    half = 1.96 * math.sqrt(0.25 / 100 + 1.96**2 / 4e4) / (1 + 1.96**2 / 100)  # the middle of a share of a half stays
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    assert low_of_all == pytest.approx(20 / (20 + 1.96**2)) and high_of_all == 1


def test_no_bins_are_no_picture(make_metrics):
    metrics = make_metrics(3)
    metrics["class_incremental"]["calibration"]["bins"] = []
    with pytest.raises(NoDataError, match="no test examples"):
        plots.reliability(metrics)


def test_bars_show_each_task_that_was_held_out(make_metrics):
    metrics = make_metrics(4)
    unknown = metrics["class_incremental"]["unknown"]
    unknown["auroc"][2] = None
    left, right = plots.no_known_task(metrics).axes
    for axes, values in ((left, unknown["auroc"]), (right, unknown["detected"])):
        known = {place: value for place, value in enumerate(values) if value is not None}
        [bars] = [container for container in axes.containers if isinstance(container, BarContainer)]
        shown = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in bars}
        assert shown == pytest.approx(known)
        assert [text.get_text() for text in axes.texts] == [f"{value:.2f}" for value in known.values()]
    lines = {line.get_label(): line.get_xdata()[0] for line in right.lines}
    assert lines == {"false alarms promised: 0.010": 0.01, "false alarms measured: 0.013": 0.013}
    assert f"mean {unknown['mean_detected']:.3f}" in right.get_xlabel()
    assert [text.get_text() for text in left.get_yticklabels()] == metrics["tasks"]


def test_without_a_threshold_only_distances_are_judged(make_metrics):
    metrics = make_metrics(3)
    metrics["class_incremental"]["unknown"].update(threshold=None, false_alarms=None, detected=None, mean_detected=None)
    [axes] = plots.no_known_task(metrics).axes
    assert axes.get_xlabel().startswith("AUROC")
