"""Busy processes compute while a context is open, and what they cost stands beside a step alone."""

import subprocess
from dataclasses import replace

import pytest

from qtuning_fast.bench.figures import slowdowns
from qtuning_fast.bench.rows import busy, tables
from qtuning_fast.bench.shapes import TINY
from qtuning_fast.bench.timing import Turns


def test_others_compute_and_end_whatever_happens(monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1])
    with pytest.raises(KeyboardInterrupt), busy.others(2):
        assert [process.poll() for process in started] == [None, None]
        raise KeyboardInterrupt
    assert all(process.returncode for process in started) and len(started) == 2


def test_an_entry_has_every_peer_alone_and_beside_others(monkeypatch):
    monkeypatch.setattr(busy, "PEERS", ("composed", "sdpa", "flex-frozen-gate"))  # the last cannot train on a CPU
    monkeypatch.setattr(busy, "BESIDE", (0, 1))
    entry = busy.measure(replace(TINY, trained=True), Turns(rounds=2))
    assert list(entry["beside"]) == ["0", "1"]
    found = slowdowns(entry, "sdpa")
    assert found[0] == 1.0 and found[1] > 0
    text = tables.busy(entry)
    assert "beside 1" in text and "composed" in text and "flex-frozen-gate: " in text
