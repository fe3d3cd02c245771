"""The first minute on a GPU, what becomes of it when kernels are wrong, and tools that are not installed."""

import json

import pytest
import torch

from qtuning_fast.bench.peers import PEERS, Peer
from qtuning_fast.bench.plans import counters, diagnose, memcheck, smoke


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnose, "limited", lambda function, *arguments: function(*arguments))


def entries(path):
    return json.loads(path.read_text())["entries"]


def test_the_machine_and_each_backend_beside_float64(tmp_path, capsys):
    out = tmp_path / "smoke.json"
    assert smoke.main(["--dry-run", "--out", str(out)]) == 0
    found = entries(out)
    assert found.keys() >= {"machine", "fused", "composed", "verdict"} and found["verdict"]["summary"] == "all is right"
    assert found["fused"]["errors"].keys() >= {"output", "query", "key", "prefix_value", "gate_tau"}
    assert found["machine"]["cores"] and "gcc" in found["tools"]["versions"]


@pytest.mark.parametrize("what", ["wrong", "raises"])
def test_what_is_wrong_is_said_and_ends_the_plan(tmp_path, monkeypatch, what):
    right = PEERS["fused"].attend

    def attend(call):
        if what == "raises":
            raise RuntimeError("an illegal memory access was encountered")
        return right(call) * 1.1

    monkeypatch.setitem(PEERS, "fused", Peer("", attend))
    out = tmp_path / "smoke.json"
    assert smoke.main(["--dry-run", "--out", str(out)]) == 1
    found = entries(out)
    assert ("is off by 0.1" if what == "wrong" else "illegal memory access") in found["verdict"]["summary"]
    assert found["verdict"]["wrong"] and found["composed"]["errors"]  # the others are asked all the same
    assert diagnose.main(["--dry-run", "--out", str(tmp_path / "diagnose.json")]) == 1
    assert entries(tmp_path / "diagnose.json")["tiny"]["wrong"]


def test_a_composed_backend_that_fails_is_a_row_and_the_plan_goes_on(tmp_path, monkeypatch):
    def attend(call):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PEERS, "composed", Peer("", attend))
    out = tmp_path / "smoke.json"
    assert smoke.main(["--dry-run", "--out", str(out)]) == 0
    verdict = entries(out)["verdict"]
    assert verdict["wrong"] == "" and "composed: RuntimeError: no such kernel" in verdict["summary"]


def test_a_tool_that_is_not_there_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(memcheck.shutil, "which", lambda name: None)
    assert memcheck.main(["--out", str(tmp_path / "m.json")]) == 0
    assert counters.main(["--dry-run", "--out", str(tmp_path / "c.json")]) == 0
    assert "not installed" in entries(tmp_path / "m.json")["memcheck"]["summary"]
    assert "not installed" in entries(tmp_path / "c.json")["none"]["summary"]
