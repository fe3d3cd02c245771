"""Who is timed, what becomes of who is not, and what a result holds."""

from dataclasses import replace

import pytest
import torch

from qtuning_fast.bench import measure as measuring
from qtuning_fast.bench.measure import QUICK, in_a_process, measure
from qtuning_fast.bench.peers import PEERS, Peer
from qtuning_fast.bench.shapes import TINY, TINY_DECODE

TURNS = QUICK._replace(rounds=2)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(measuring, "in_a_process", lambda function, *arguments: function(*arguments))


def test_a_wrong_peer_is_caught_and_not_timed(monkeypatch):
    right = PEERS["eager"].attend
    monkeypatch.setitem(PEERS, "eager", Peer("", lambda call: right(call) * 0.5))
    entry = measure(TINY, ["eager", "sdpa"], "cpu", turns=TURNS)
    row = entry["rows"]["eager"]
    assert "is off by 0.5" in row["error"] and row["errors"]["output"] == pytest.approx(0.5)
    assert row["forward"]["eager"] is None and row["step"]["eager"] is None and row["peak"] is None
    assert entry["rows"]["sdpa"]["step"]["eager"]["rounds"] == 2


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
    row = measure(TINY, ["eager"], "cpu", turns=TURNS)["rows"]["eager"]
    assert row["error"] == "wrong: prefix_key is off by 1" and row["errors"]["output"] < 1e-5


def test_what_a_peer_cannot_train_it_may_compute(monkeypatch):
    right = PEERS["eager"].attend

    def no_training(call):
        if call.query.requires_grad:
            raise NotImplementedError("no backward here")
        return right(call)

    monkeypatch.setitem(PEERS, "flex", Peer("", no_training))
    entry = measure(TINY, ["composed", "flex"], "cpu", turns=TURNS)
    row = entry["rows"]["flex"]
    assert row["error"] == "NotImplementedError: no backward here"
    assert row["forward"]["eager"] and row["step"]["eager"] is None and row["backward"]["eager"] is None


def test_a_result_has_all_passes():
    entry = measure(TINY, ["composed"], "cpu", turns=TURNS)
    row = entry["rows"]["composed"]
    assert all(row[name]["eager"]["rounds"] == 2 and row[name]["graph"] is None for name in measuring.PASSES)
    assert entry["shape"]["M"] == 24
    assert not row["error"]


def test_what_is_not_trained_is_a_forward_pass():
    entry = measure(TINY_DECODE, ["composed", "sdpa-no-concat"], "cpu", turns=TURNS)
    row = entry["rows"]["composed"]
    assert list(row["errors"]) == ["output"] and row["forward"]["eager"] and row["step"]["eager"] is None


def test_a_process_of_its_own_returns_what_it_computes_and_raises_what_it_raises():
    assert in_a_process(sorted, [2, 1], reverse=True) == [2, 1]
    with pytest.raises(ValueError, match="invalid literal"):
        in_a_process(int, "x")
