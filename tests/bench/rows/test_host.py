"""The benchmark of the host's work: launches reach Triton's launcher, and only there nothing happens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qtuning_fast.bench.rows import host

ROOT = Path(__file__).parents[3]

LAUNCHED = """
import torch
from qtuning_fast.bench import shapes
from qtuning_fast.bench.rows import host
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.kernels import launch

launched = []
host.Launcher.launch = staticmethod(lambda *arguments: launched.append(arguments))


def leaves(x, given):
    if isinstance(x, torch.Tensor):
        return [(x.dtype, given.get(x.data_ptr(), "new"))]
    return [leaf for each in x for leaf in leaves(each, given)] if isinstance(x, tuple) else [repr(x)]


with host.without_gpu():
    for shape in (shapes.TINY, shapes.TINY_PADDED, shapes.TINY_MIXED):
        for backend in ("fused", "composed"):
            for enabled in (False, True, True, True):  # built, seen once, recorded, run again
                x = shapes.inputs(shape, dtype=torch.bfloat16, device="cpu").tracked()
                launch.enabled = enabled
                launched.clear()
                PEERS[backend].prepare(shape, x).step(x.d_output)
                given = {y.data_ptr(): name for name, y in x.tensors().items()}
                found = [leaves(tuple(y for y in each if isinstance(y, (int, tuple))), given) for each in launched]
                assert not enabled or found == expected, (shape, backend)
                expected = found
            print(shape.name, backend, len(found))
"""


def in_a_process(*arguments: str) -> str:
    """In this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_launch_of_a_step_gets_as_far_as_the_launcher_and_takes_the_same_when_it_is_run_again():
    shapes = ("tiny", "tiny-padded", "tiny-mixed")
    assert in_a_process("-c", LAUNCHED).splitlines() == [f"{x} {by} 7" for x in shapes for by in ("fused", "composed")]


def test_rows_and_stages(tmp_path):
    out = tmp_path / "host.json"
    text = in_a_process("-m", "qtuning_fast.bench.rows.host", "--dry-run", "--out", str(out))
    document = json.loads(out.read_text())
    (entry,) = document["entries"].values()
    assert not document["errors"] and all(row["median"] > 0 for row in entry["rows"].values())
    assert {"fused, forward", "fused, step", "composed, step", "sdpa", *host.STAGES} <= entry["rows"].keys()
    assert all(f"  {name} " in text for name in entry["rows"]) and "the operator and autograd" in text
    assert max(map(len, text.splitlines())) <= 120


def test_what_goes_wrong_is_a_row():
    rows = {"fused, step": {"error": "RuntimeError: no compiler"}}
    rows |= {stage: {"median": 1.0, "spread": 0.0, "fastest": 1.0, "rounds": 1} for stage in host.STAGES}
    assert "RuntimeError: no compiler" in host.table(rows)


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(host, "INTERPRETED", True)
    with pytest.raises(SystemExit):
        host.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err
