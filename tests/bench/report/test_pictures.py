"""Pictures draw what the files hold: each peer at its ratio, each size at its time."""

import pytest

from qtuning_fast.bench.report import pictures


def row(ms):
    timing = {"graph": None, "eager": {"median": ms, "spread": 0.2}}
    return {"step": timing, "forward": timing, "peak": 1, "error": ""}


def test_a_peer_stands_at_its_time_over_ours():
    shape = {"trained": True, "of": "a model", "B": 2}
    rows = {"composed": row(2.0), "eager": row(6.0)}
    figure = pictures.against_peers({"entries": {"a": {"shape": shape, "title": "B2", "rows": rows}}})
    drawn = {c.get_label(): float(c.lines[0].get_xdata()[0]) for c in figure.axes[0].containers}
    assert drawn == {"composed (ours)": 1.0, "eager PyTorch": 3.0}


def test_growth_has_a_line_for_each_peer():
    points = {size: {"composed": row(ms), "eager": row(3 * ms)} for size, ms in (("1", 1.0), ("2", 2.0))}
    entry = {"points": points, "peers": ["composed", "eager"], "pass": "step"}
    lines = pictures.growth({"entries": {"N": entry}}).axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 2.0], [3.0, 6.0]]


@pytest.mark.parametrize(("x", "text"), [(0.1234, "0.123"), (12.34, "12.3"), (1234.5, "1,230"), (98765.0, "98,800")])
def test_numbers_have_three_digits(x, text):
    assert pictures._rounded(x) == text
