"""Two processes on the CPU: plain data parallelism, and a backbone sharded by FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("distributed_run.py")


def run(folder: Path, processes: int, *, sharded: bool = False, retention: float = 0.0) -> list[dict[str, Any]]:
    """What each process came to, with eight samples a step in all."""
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    options = [str(folder), str(8 // processes), "sharded" if sharded else "whole", str(retention)]
    subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), *options],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one") / "process", 1)[0]


@pytest.mark.parametrize(
    "sharded",
    [pytest.param(False, id="data parallel", marks=pytest.mark.thorough), pytest.param(True, id="sharded backbone")],
)
def test_two_processes_come_to_what_one_comes_to(tmp_path: Path, alone: dict[str, Any], sharded: bool) -> None:
    first, second = run(tmp_path / "two", 2, sharded=sharded)
    assert first == second
    assert len(first["losses"]) == 12
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(alone["losses"]), atol=1e-4, rtol=0)


@pytest.mark.thorough
def test_with_memory_retention_queue_evictions_and_adapters_are_the_same_in_both(tmp_path: Path) -> None:
    first, second = run(tmp_path / "two", 2, retention=0.1)
    assert first == second
