"""The first minute on a GPU, what becomes of it when kernels are wrong, and the tools that are asked where they are."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch

from qtuning_fast.bench.peers import PEERS, Peer
from qtuning_fast.bench.plans import counters, diagnose, durations, memcheck, smoke
from qtuning_fast.bench.plans.plan import PLANS
from qtuning_fast.kernels.blocks import blocks_for


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


def test_a_tool_that_is_not_there_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(memcheck.shutil, "which", lambda name: None)
    assert memcheck.main(["--out", str(tmp_path / "m.json")]) == 0
    assert counters.main(["--dry-run", "--out", str(tmp_path / "c.json")]) == 0
    assert "not installed" in entries(tmp_path / "m.json")["memcheck"]["summary"]
    assert "not installed" in entries(tmp_path / "c.json")["none"]["summary"]


def test_what_a_sanitizer_finds_fails_the_step(tmp_path, monkeypatch):
    said = ["========= ERROR SUMMARY: 0 errors", "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)"]
    really = subprocess.run

    def run(command, **options):
        if "--step" not in command:
            return really(command, **options)
        assert options["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        if "--tool" not in command:
            return subprocess.CompletedProcess(command, 0, stdout="", stderr="")
        assert command[2] in memcheck.TOOLS
        return subprocess.CompletedProcess(command, 0, stdout=said[memcheck.TOOLS.index(command[2])], stderr="")

    monkeypatch.setattr(memcheck.shutil, "which", lambda name: "/bin/compute-sanitizer")
    monkeypatch.setattr(memcheck.subprocess, "run", run)
    assert memcheck.main(["--out", str(tmp_path / "m.json")]) == 1
    found = entries(tmp_path / "m.json")
    assert (
        found["memcheck"]["summary"] == "memcheck: ERROR SUMMARY: 0 errors"
        and "2 hazards" in found["racecheck"]["summary"]
    )


def test_a_step_that_never_ran_has_no_errors_and_is_not_fine(tmp_path, monkeypatch):
    said = "========= ERROR SUMMARY: 0 errors\nNo module named triton"

    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, stdout=said, stderr="")

    monkeypatch.setattr(memcheck.shutil, "which", lambda name: "/bin/compute-sanitizer")
    monkeypatch.setattr(memcheck.subprocess, "run", run)
    found = dict(memcheck.sanitized(["tasks"]))
    assert next(iter(found)) == "plain" and not any(each["fine"] for each in found.values())
    assert found["memcheck"]["summary"] == "memcheck: ERROR SUMMARY: 0 errors, exit status 1"


def test_tools_end_with_the_step(monkeypatch):
    def run(command, *, timeout, **options):
        assert timeout <= 10.0
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(memcheck.shutil, "which", lambda name: "/bin/compute-sanitizer")
    monkeypatch.setattr(memcheck.subprocess, "run", run)
    found = dict(memcheck.sanitized(["tasks"], time.monotonic() + 10.0))
    assert "not through" in found["racecheck"]["summary"] and not found["racecheck"]["fine"]


def test_the_counters_of_all_shapes_fit_into_their_step():
    [step] = [step for step in PLANS["gpu"] if step.name == "counters"]
    assert durations.IMPORTS + len(counters.MEASURED) * counters.SECONDS <= step.seconds


def test_the_small_step_runs():
    memcheck.steps(["tasks"])


CSV = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","forward_kernel(int)","GPU Speed Of Light Throughput","Duration","usecond","12.5"
"0","1","forward_kernel(int)","Occupancy","Achieved Occupancy","%","24.1"
"1","1","forward_kernel(int)","GPU Speed Of Light Throughput","Duration","usecond","13.5"
"""


def test_counters_are_read_by_kernel_and_clocks_are_left_alone(monkeypatch):
    def run(command, **options):
        assert command[command.index("--clock-control") + 1] == "none"
        return subprocess.CompletedProcess(command, 0, stdout=CSV, stderr="")

    monkeypatch.setattr(counters.subprocess, "run", run)
    found = counters.counted("ncu", "bert-base")
    assert found["kernels"]["forward_kernel"] == {"Duration": "12.5 usecond", "Achieved Occupancy": "24.1 %"}
    assert found["kernels"]["forward_kernel 2"] == {"Duration": "13.5 usecond"}
    assert counters.read("nothing") == {}
