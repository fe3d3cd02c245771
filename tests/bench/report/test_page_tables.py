"""Each table of the page holds ratios to ours, and says who failed."""

from qtuning_fast.bench.report import page_tables


def row(ms, peak=None, error=""):
    timing = {"graph": None, "eager": None if error else {"median": ms, "spread": 0.1}}
    return {"step": timing, "forward": timing, "peak": peak, "error": error}


def document(rows, **more):
    shape = {"name": "a", "of": "a model"}
    entry = {
        "shape": shape,
        "title": "B2",
        "rows": rows,
        "floor_ms": {"step": [1.0, "bytes"], "forward": [0.5, "bytes"]},
    }
    return {"entries": {"a": entry | more}}


def test_peers_are_given_over_ours():
    rows = {"composed": row(2.0, 20 << 20), "eager": row(6.0, 50 << 20), "sdpa": row(1.0), "sdpa-no-concat": row(0.5)}
    [line] = [x for x in page_tables.attention(document(rows)) if x.startswith("| a model")]
    assert line == "| a model: B2 | 2 ms (composed) | 50% | 3.00 × | 0.50 × | 0.25 × | 20 MiB, 50 MiB, – |  |"


def test_peers_that_failed_are_listed_by_their_error():
    rows = {"composed": row(2.0), "flex": row(0, error="no backward"), "flex-merged": row(0, error="no backward")}
    assert page_tables.attention(document(rows))[-1] == "- flex, flex-merged: `no backward`"


def test_decoding_shows_what_share_of_the_time_is_the_roofline():
    line = page_tables.decode(document({"composed": row(2.0), "sdpa-no-concat": row(3.0)}))[-1]
    assert line == "| B2 | 2 ms (composed) | 25% | 1.50 × |  |"


def test_an_ingredient_costs_what_a_step_without_it_saves():
    rows = {"all": row(4.0)} | {f"without {x}": row(2.0) for x in ("gate", "reweighting", "bank", "padding", "any")}
    line = page_tables.ingredients(document(rows, peer="fused"))[-1]
    assert line.startswith("| fused, B2 | +100.0% |") and line.count("+100.0%") == 5


def test_tests_are_counted_and_failures_named():
    found = {"side by side": {"passed": 3, "failed": 1, "failures": {"test_x": "AssertionError"}}}
    lines = page_tables.tests({"entries": found})
    assert "| side by side | 3 | 1 | 0 |" in lines and lines[-1] == "- `test_x`: `AssertionError`"


def test_models_that_cannot_train_are_listed_by_their_error_below_the_table():
    trained = {"timing": {}, "tokens_per_second": 1234.5, "peak_bytes": 1 << 20, "trainable_parameters": 7}
    rows = {"ours": trained, "flex": {"timing": None, "error": "it cannot"}}
    lines = page_tables.models({"entries": {"bert": {"rows": rows}, "t5": {"rows": rows}}})
    assert lines[2:4] == ["| bert: ours | 1,234 | 1 MiB | 7 |", "| t5: ours | 1,234 | 1 MiB | 7 |"]
    assert lines[4:] == ["", "- bert: flex, t5: flex: `it cannot`"]


def test_what_inferring_costs_stands_beside_what_was_predicted():
    row = {"predicted": {"fit_seconds": 1.5, "score_ms": 1.8}, "fit_seconds": {"median": 2.5}, "fit_peak_bytes": None}
    row |= {"statistics_bytes": 4 << 20, "rule_bytes": 5 << 20}
    row |= {"ms": {"score": {"median": 2.0}, "forward": {"median": 50.0}, "record": {"median": 3.0}}}
    entry = {"of": "BERT", "sizes": {"hidden": 384}, "rows": {"2000": row}, "passes_to_record": 8}
    lines = page_tables.task_inference({"entries": {"bert": entry}})
    expected = "2.50 s (1.50 s) |  | 4.0 MiB | 5.0 MiB | 2.0 ms (1.8 ms) | 0.040 | 3.0 ms beside 0.4 s of passes |"
    assert lines[2] == f"| BERT, F = 384: 2,000 tasks | {expected}"
