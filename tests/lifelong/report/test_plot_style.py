"""What the pictures share."""

import numpy as np
import pytest

from qtuning_fast.lifelong.report import plot_style
from qtuning_fast.lifelong.report.plot_style import WIDTH, band, label, new_figure, task_ticks


def test_a_figure_has_its_panels_and_its_title():
    figure, axes = new_figure("Title", height=3, panels=2)
    assert figure.get_suptitle() == "Title" and len(axes) == len(figure.axes) == 2
    assert tuple(figure.get_size_inches()) == (WIDTH, 3)
    assert axes[0].get_shared_x_axes().joined(*axes)


def test_panels_beside_each_other_share_y():
    _, [left, right] = new_figure("Title", height=3, panels=2, beside=True)
    left.set_ylim(3, -1)
    left.set_xlim(0, 7)
    assert right.get_ylim() == (3, -1) and right.get_xlim() != (0, 7)
    assert left.get_position().x1 < right.get_position().x0


@pytest.mark.parametrize(
    ("name", "shown"),
    [("two\nlines", "two lines"), ("$x$", r"\$x\$"), ("a" * 22, "a" * 22), ("a" * 23, "a" * 21 + "…")],
)
def test_a_label_is_one_short_line_without_mathematics(name, shown):
    assert label(name) == shown


@pytest.mark.parametrize(("tasks", "every"), [(3, 1), (24, 1), (25, 2), (70, 3)])
def test_of_many_tasks_only_some_are_named(tasks, every):
    _, [axes] = new_figure("", height=3)
    task_ticks(axes.xaxis, [f"task {number}" for number in range(tasks)])
    assert list(axes.get_xticks()) == list(range(0, tasks, every))
    assert axes.get_xticklabels()[-1].get_text() == f"task {(tasks - 1) // every * every}"


def test_a_band_is_the_range_around_the_mean():
    _, [axes] = new_figure("", height=3)
    band(axes, np.arange(2), np.array([[0.0, np.nan], [2.0, 4.0]]), "black")
    assert axes.lines[0].get_ydata().tolist() == [1, 4]
    [filled] = axes.collections
    assert {y for _, y in filled.get_paths()[0].vertices} == {0, 2, 4}


def test_small_pieces():
    assert np.isnan(plot_style.pad_rows([[1], [1, 2]])[0, 1]) and plot_style.pad_rows([]).size == 0
    assert plot_style.evenly_spaced(3, limit=6) == [0, 1, 2] and plot_style.evenly_spaced(10, limit=4) == [0, 3, 6, 9]
    colours = plot_style.sequential_colours(5)
    assert len(set(colours)) == 5 and all(colour[0] == "#" and len(colour) == 7 for colour in colours)
    _, [axes] = new_figure("", height=3)
    plot_style.start_y_at_zero(axes, 2.0)
    assert axes.get_ylim() == pytest.approx((0, 2.3))
