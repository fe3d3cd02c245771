"""A small step under compute-sanitizer: what it finds fails, and so does a step that never ran."""

import json
import subprocess
import time

from qtuning_fast.bench.plans import memcheck


def entries(path):
    return json.loads(path.read_text())["entries"]


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


def test_the_small_step_runs():
    memcheck.steps(["tasks"])
