"""Figures are compared by the same clock only, and ours is what `auto` takes."""

from qtuning_fast.bench import figures


def row(graph=None, eager=None, turns=True):
    timing = {which: ms and {"median": ms, "spread": 0.1} for which, ms in (("graph", graph), ("eager", eager))}
    return {"step": timing, "turns": turns}


def test_the_gpu_s_own_time_comes_first():
    assert figures.median(row(graph=1.0, eager=3.0), "step") == 1.0
    assert figures.median(row(eager=3.0), "step") == 3.0 and figures.median(row(), "step") is None


def test_a_ratio_is_by_one_clock():
    assert figures.ratio(row(graph=1.0, eager=6.0), row(graph=2.0, eager=3.0), "step") == 0.5
    assert figures.ratio(row(graph=1.0, eager=6.0), row(eager=3.0), "step") == 2.0
    assert figures.ratio(row(graph=1.0), row(eager=3.0), "step") is None and figures.ratio(None, row(), "step") is None
    assert figures.ratio(row(eager=1.0), row(eager=2.0, turns=False), "step") is None


def test_ours_is_what_auto_takes_where_it_was_measured():
    entry = {"rows": {"composed": row(eager=2.0), "reference": row(eager=1.0)}, "auto": {"backend": "reference"}}
    assert figures.auto(entry, "step") == "reference"
    entry["rows"]["reference"] = row()
    assert figures.auto(entry, "step") == "composed" and figures.auto({"rows": {}}, "step") is None
