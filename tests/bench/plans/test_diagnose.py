"""Case after case in processes of their own, until the smallest that fails is known."""

import json
import os
import signal
import time

import pytest
import torch

from qtuning_fast.bench.plans import diagnose
from qtuning_fast.kernels.blocks import blocks_for


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(diagnose, "limited", lambda function, *arguments: function(*arguments))


def entries(path):
    return json.loads(path.read_text())["entries"]


def test_where_all_cases_are_right_the_plan_has_the_time_back(tmp_path):
    assert diagnose.main(["--dry-run", "--out", str(tmp_path / "diagnose.json")]) == 0


def _kills_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def _sleeps():
    time.sleep(300)


def test_a_case_that_hangs_or_dies_is_ended_and_said_so(monkeypatch):
    monkeypatch.undo()
    assert diagnose.limited(sum, [1, 2]) == 3
    with pytest.raises(RuntimeError, match="its process ended with status -9"):
        diagnose.limited(_kills_itself)
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        diagnose.limited(int, "x")
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="not through after 1 s"):
        diagnose.limited(_sleeps, seconds=1.0)
    assert time.monotonic() - started < 30


def test_the_smallest_case_that_fails_is_tried_with_other_blocks(tmp_path, monkeypatch):
    def step(shape, backend, device):
        seen.append((shape.name, blocks_for("interpreter", 4, shape.D, "queries").stages))
        return {"output": 1.0 if shape.is_causal else 1e-6}

    seen = []
    monkeypatch.setattr(diagnose, "step", step)
    monkeypatch.setattr(diagnose, "INTERPRETED", False)
    monkeypatch.setattr(diagnose, "compiled", lambda shape: {"forward": {"ttgir": "…", "ptx": "…"}})
    assert diagnose.main(["--out", str(tmp_path / "diagnose.json")]) == 1
    found = entries(tmp_path / "diagnose.json")
    assert next(name for name, entry in found.items() if entry.get("wrong")) == "causal"
    assert seen[0][0] == "one tile" and ("causal", 1) in seen[len(diagnose.CASES) :]
    assert found["compiled"]["each"]["forward"].keys() == {"ttgir", "ptx"}
    assert list(found)[:3] == ["compiled", "memcheck", "racecheck"]  # before the cases, which may take all the time
