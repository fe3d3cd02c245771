"""What `qtuning-fast bench` says of its figures."""

from qtuning_fast.bench import console


def entry(**steps):
    """Of a training shape: peers with a step's median, or what it failed by."""
    rows = {}
    for name, ms in steps.items():
        timing = None if isinstance(ms, str) else {"median": ms, "spread": 0.1, "rounds": 8}
        passes = {each: {"graph": None, "eager": timing} for each in ("forward", "backward", "step")}
        rows[name] = passes | {"peak": 1 << 20, "error": ms if timing is None else "", "errors": {"output": 1e-7}}
    return {"shape": {"trained": True}, "rows": rows, "auto": {"backend": next(iter(rows))}}


def test_the_sentence_says_how_ours_stands():
    assert console.verdict(entry(composed=2.0, eager=8.4, sdpa=1.8)) == (
        "composed is 4.2 times as fast as eager and takes 1.1 times the time of PyTorch's attention without a gate."
    )
    assert console.verdict(entry(fused=2.0, sdpa="no")) == "fused takes 2.00 ms."
    assert console.verdict(entry(composed="wrong: tau", eager=1.0)) == "composed was not measured: wrong: tau"


def test_a_backend_that_is_faster_here_is_named_unless_it_is_noise():
    assert console.verdict(entry(composed=2.0, eager=4.0, fused=1.5)).endswith(
        "Here fused takes 0.75 times as long: QTUNING_FAST_BACKEND=fused chooses it."
    )
    assert "Here" not in console.verdict(entry(composed=2.0, eager=4.0, fused=1.9))


def test_a_table_has_a_row_a_peer_and_dashes_for_one_that_failed():
    table = console.times_table(entry(composed=2.0, eager="out of memory"))
    cells = {column.header: list(column.cells) for column in table.columns}
    assert (
        cells["peer"] == ["composed", "eager"] and cells["step"] == ["2.00", "–"] and cells["× ours"] == ["1.00", "–"]
    )
    assert cells["MB"] == ["1.00", "–"] and cells["error"] == ["1e-07", "–"]
    assert console.peers_table(entry(composed=2.0, eager="out of memory")).row_count == 3  # its error has a row
