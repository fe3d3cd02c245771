"""Tables of results: who took how long, who could not, and how ours stands."""

import pytest

from qtuning_fast.bench import measure as measuring
from qtuning_fast.bench.measure import QUICK
from qtuning_fast.bench.peers import PEERS, Peer
from qtuning_fast.bench.rows import tables
from qtuning_fast.bench.rows.attention import measure
from qtuning_fast.bench.rows.roofline import Ceilings
from qtuning_fast.bench.shapes import TINY, TINY_DECODE

CEILINGS = Ceilings(flops=1e12, copied=1e11, read=9e10, special=1e11)
TURNS = QUICK._replace(rounds=2)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(measuring, "in_a_process", lambda function, *arguments: function(*arguments))


def test_a_wrong_peer_stands_at_the_end(monkeypatch):
    right = PEERS["eager"].attend
    monkeypatch.setitem(PEERS, "eager", Peer("", lambda call: right(call) * 0.5))
    assert "eager: wrong: " in tables.attention(measure(TINY, ["eager", "sdpa"], "cpu", CEILINGS, turns=TURNS))


def test_what_a_peer_cannot_train_is_said(monkeypatch):
    right = PEERS["eager"].attend

    def no_training(call):
        if call.query.requires_grad:
            raise NotImplementedError("no backward here")
        return right(call)

    monkeypatch.setitem(PEERS, "flex", Peer("", no_training))
    text = tables.attention(measure(TINY, ["composed", "flex"], "cpu", CEILINGS, turns=TURNS))
    assert "flex: NotImplementedError: no backward here" in text and max(map(len, text.splitlines())) <= 120


def test_each_pass_has_its_roofline():
    entry = measure(TINY, ["composed"], "cpu", CEILINGS, turns=TURNS)
    assert entry["floor_ms"].keys() == {"forward", "backward", "step"}
    entry = measure(TINY_DECODE, ["composed", "sdpa-no-concat"], "cpu", CEILINGS, turns=TURNS)
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
    assert f"{standing} +50.0%, the roofline 50% of it and 75% without" in text
    assert "  trained are query, key, value, prefix, U, V, alpha, tau: composed, eager" in text
    [line] = [line.split() for line in text.splitlines() if line.startswith("  eager ")]
    assert line[5:7] == ["3.00", "17%"]
