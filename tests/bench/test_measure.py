"""Who is timed, what becomes of who is not, and what a result holds."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from qtuning_fast.bench import measure as measuring
from qtuning_fast.bench import memory, tables
from qtuning_fast.bench.measure import QUICK, in_a_process, measure, measure_cases, measure_each
from qtuning_fast.bench.peers import PEERS, Peer
from qtuning_fast.bench.results import Results
from qtuning_fast.bench.roofline import Ceilings
from qtuning_fast.bench.rows.ingredients import cases
from qtuning_fast.bench.shapes import MINILM_CPU, TINY, TINY_DECODE

CEILINGS = Ceilings(flops=1e12, copied=1e11, read=9e10, special=1e11)
TURNS = QUICK._replace(rounds=2)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(measuring, "in_a_process", lambda function, *arguments: function(*arguments))


def test_a_wrong_peer_is_caught_and_not_timed(monkeypatch):
    right = PEERS["eager"].attend
    monkeypatch.setitem(PEERS, "eager", Peer("", lambda call: right(call) * 0.5))
    entry = measure(TINY, ["eager", "sdpa"], "cpu", CEILINGS, turns=TURNS)
    row = entry["rows"]["eager"]
    assert "is off by 0.5" in row["error"] and row["errors"]["output"] == pytest.approx(0.5)
    assert row["forward"]["eager"] is None and row["step"]["eager"] is None and row["peak"] is None
    assert entry["rows"]["sdpa"]["step"]["eager"]["rounds"] == 2
    assert "eager: wrong: " in tables.attention(entry)


def test_a_wrong_gradient_is_caught_too(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    right = PEERS["eager"].attend
    wrong = Peer("", lambda call: right(replace(call, prefix_key=Wrong.apply(call.prefix_key))))
    monkeypatch.setitem(PEERS, "eager", wrong)
    row = measure(TINY, ["eager"], "cpu", CEILINGS, turns=TURNS)["rows"]["eager"]
    assert row["error"] == "wrong: prefix_key is off by 1" and row["errors"]["output"] < 1e-5


def test_what_a_peer_cannot_train_it_may_compute(monkeypatch):
    right = PEERS["eager"].attend

    def no_training(call):
        if call.query.requires_grad:
            raise NotImplementedError("no backward here")
        return right(call)

    monkeypatch.setitem(PEERS, "flex", Peer("", no_training))
    entry = measure(TINY, ["composed", "flex"], "cpu", CEILINGS, turns=TURNS)
    row = entry["rows"]["flex"]
    assert row["error"] == "NotImplementedError: no backward here"
    assert row["forward"]["eager"] and row["step"]["eager"] is None and row["backward"]["eager"] is None
    text = tables.attention(entry)
    assert "flex: NotImplementedError: no backward here" in text and max(map(len, text.splitlines())) <= 120


def test_a_result_has_all_passes_and_their_floors():
    entry = measure(TINY, ["composed"], "cpu", CEILINGS, turns=TURNS)
    row = entry["rows"]["composed"]
    assert all(row[name]["eager"]["rounds"] == 2 and row[name]["graph"] is None for name in measuring.PASSES)
    assert entry["floor_ms"].keys() == {"forward", "backward", "step"} and entry["shape"]["M"] == 24
    assert not row["error"]


def test_what_is_not_trained_is_a_forward_pass():
    entry = measure(TINY_DECODE, ["composed", "sdpa-no-concat"], "cpu", CEILINGS, turns=TURNS)
    row = entry["rows"]["composed"]
    assert list(row["errors"]) == ["output"] and row["forward"]["eager"] and row["step"]["eager"] is None
    assert entry["floor_ms"].keys() == {"forward"} and "composed" in tables.attention(entry)


def test_the_table_says_how_ours_stands():
    entry = measure(TINY, ["composed", "composed-plain", "eager", "sdpa"], "cpu", CEILINGS, turns=TURNS)
    for row, ms in zip(entry["rows"].values(), (3.0, 2.0, 9.0, 2.0)):
        row["forward"]["eager"] = row["step"]["eager"] = {"median": ms, "spread": 0.1, "rounds": 1}
    entry["floor_ms"]["step"] = (1.5, "bytes")
    text = tables.attention(entry)
    standing = (
        "composed: 3.00 times as fast as eager; 1.50 times the time of sdpa, without a gate; gate and reweighting"
    )
    assert f"{standing} +50.0%, the floor 50% of it and 75% without" in text
    assert "  trained are query, key, value, prefix, U, V, alpha, tau: composed, eager" in text
    [line] = [line.split() for line in text.splitlines() if line.startswith("  eager ")]
    assert line[5:7] == ["3.00", "17%"]


def test_ingredients_are_left_out_one_by_one():
    rows = measure_cases(cases(TINY, "composed"), "cpu", torch.float32, TURNS)
    assert not any(row.error for row in rows.values())
    gradients = {name: set(row.errors) for name, row in rows.items()}
    assert gradients["all"] - gradients["without gate"] == {"gate_alpha", "gate_tau"}
    assert gradients["all"] - gradients["without reweighting"] == {"U_key", "V_key", "U_value", "V_value"}
    shapes = {name: shape for name, (shape, _) in cases(TINY, "composed").items()}
    assert shapes["all"].tasks > 1 == shapes["without bank"].tasks and shapes["without bank"].padding
    assert shapes["all"].padding > 0 == shapes["without padding"].padding


def test_the_peak_of_a_step_counts_what_is_taken_and_given_back(monkeypatch):
    right = PEERS["eager"].attend

    def greedy(call):
        # 132 MiB: the kernel counts a thread's pages in portions, so that the last of them may be missing.
        return right(call) + torch.ones(33 << 20 if len(call.query) == MINILM_CPU.B else 1).sum() * 0

    modest = memory.peak(MINILM_CPU, "composed", "cpu", torch.float32)
    if modest is None:
        pytest.skip("no /proc/self/clear_refs")
    monkeypatch.setitem(PEERS, "eager", Peer("", greedy))
    assert memory.peak(MINILM_CPU, "eager", "cpu", torch.float32) > 128 << 20 > modest


def test_an_entry_that_fails_does_not_stop_the_others(tmp_path, capsys):
    def job(name):
        if name == "b":
            raise RuntimeError("died")
        return {"name": name}

    results = Results("x", tmp_path / "x.json", "cpu")
    assert measure_each(results, {name: partial(job, name) for name in "abc"}, lambda entry: entry["name"] * 3) == 1
    assert list(results.document["entries"]) == ["a", "c"] and results.document["errors"] == {"b": "RuntimeError: died"}
    text = capsys.readouterr().out
    assert "aaa" in text and "ccc" in text and "b: RuntimeError: died" in text
    assert measure_each(Results("x", tmp_path / "x.json", "cpu"), {"a": partial(job, "a")}, str) == 0


def test_a_process_of_its_own_returns_what_it_computes_and_raises_what_it_raises():
    assert in_a_process(sorted, [2, 1], reverse=True) == [2, 1]
    with pytest.raises(ValueError, match="invalid literal"):
        in_a_process(int, "x")
