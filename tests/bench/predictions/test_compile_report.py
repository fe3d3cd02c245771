"""The kernels through the real compiler, for GPUs that are not there: no spills, and shared memory that suffices."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qtuning_fast.bench.predictions import compile_report
from qtuning_fast.bench.predictions.compile_report import Row, table

thorough = pytest.mark.thorough
ROOT = Path(__file__).parents[3]
ROW = Row("sm_90", "bf16", 64, "plain", "forward", "64x64x64", 4, 2, registers=200, shared=1000)


def compiled(tmp_path: Path, *arguments: str) -> list[dict]:
    """The report of a run of its own: in this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "qtuning_fast.bench.predictions.compile_report",
        "--json",
        str(tmp_path / "report.json"),
    ]
    result = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((tmp_path / "report.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("head_size", "contexts", "kernels"),
    [
        ("64", ["bank"], 8),
        *(pytest.param(size, compile_report.CONTEXTS, 81, marks=thorough) for size in ("32", "64", "128")),
    ],
    ids=["64 bank", "32", "64", "128"],
)
def test_nothing_spills_and_loads_overlap_on_hopper(tmp_path, head_size, contexts, kernels):
    which = ["--target", "sm_90", "--dtype", "bf16", "--head-size", head_size, "--context", *contexts]
    rows = compiled(tmp_path, *which)
    assert len(rows) == kernels and all(row["registers"] > 0 for row in rows)
    assert all(row["spilled"] <= {"biased": 64, "packed": 8}.get(row["context"], 0) for row in rows)
    # Kernels that walk over keys, queries or a prefix load ahead of what they compute: no copy is waited for at once.
    walking = [row for row in rows if row["kernel"] not in ("fold", "prefix", "reweighting", "sink")]
    assert walking and all(row["in_flight"] > 0 for row in walking)
    kernels_seen = {"fold", "forward", "queries", "keys", "prefix", "reweighting", "merge", "prefix-queries"}
    assert {row["kernel"] for row in rows} - {"sink"} == kernels_seen


@thorough
def test_every_target_compiles(tmp_path):
    rows = compiled(tmp_path, "--dtype", "bf16", "--head-size", "64", "--context", "padded")
    assert {row["target"] for row in rows} == set(compile_report.TARGETS) and all(row["registers"] > 0 for row in rows)


LOOPS = """
tt.func public @kernel() {
  %0 = scf.for %i = %a to %b step %c iter_args(%x = %y) -> (i32)  : i32 {
    %1 = ttg.async_wait %t, %u {num = 2 : i32} loc(#loc1)
    %2 = ttng.warp_group_dot %k, %s, %z {isAsync = true} loc(#loc1)
    scf.yield %x loc(#loc1)
  } loc(#loc1)
  %3 = ttg.async_wait {num = 0 : i32} loc(#loc1)
  scf.for %i = %a to %b step %c : i32 {
    scf.for %j = %a to %b step %c : i32 {
      %4 = ttg.async_wait %t {num = 0 : i32} loc(#loc1)
      %5 = tt.dot %k, %s, %z loc(#loc1)
    } loc(#loc1)
  } loc(#loc1)
  scf.for %i = %a to %b step %c : i32 {
    scf.if %cond {
      %6 = ttng.warp_group_dot %k, %s, %z loc(#loc1)
    } else {
      %7 = arith.addi %a, %b loc(#loc1)
    } loc(#loc1)
  } loc(#loc1)
  scf.for %i = %a to %b step %c : i32 {
    %8 = arith.addi %a, %b loc(#loc1)
  } loc(#loc1)
} loc(#loc)
"""


def test_copies_in_flight_are_those_of_loops_with_products():
    assert compile_report.in_flight(LOOPS) == [2, 0, 0]  # what drains after a loop does not count


def test_faults_are_named():
    assert ROW.fault == ""
    assert replace(ROW, spilled=8).fault == "8 bytes spilled"
    assert replace(ROW, spilled=8, dtype="fp32").fault == replace(ROW, spilled=8, target="sm_80").fault == ""
    assert "shared memory" in replace(ROW, shared=10**6).fault
    assert replace(ROW, error="no such instruction").fault == "no such instruction"
    assert max(map(len, table([ROW, replace(ROW, dtype="fp32")]).splitlines())) <= 120


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "INTERPRETED", True)
    with pytest.raises(SystemExit):
        compile_report.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err
