"""Training in two processes on the CPU: plain data parallelism, and a backbone sharded by FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qtuning_fast.model.distributed import full_tensor, synchronize

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


def test_alone_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *args: pytest.fail("there is no one to send to"))
    tensor = torch.arange(3.0)
    synchronize([tensor])
    assert torch.equal(tensor, torch.arange(3.0))


def test_values_of_the_first_process_are_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    first = [torch.tensor([7, 8]), torch.full((2, 2), 0.5, dtype=torch.bfloat16)]

    def broadcast(objects: list[Any]) -> None:
        assert [tensor.device.type for tensor in objects[0]] == ["cpu", "cpu"]
        objects[0] = first

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    here = [torch.zeros(2, dtype=torch.int64), torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))]
    given = list(here)
    synchronize(here)
    assert all(now is before for now, before in zip(here, given))
    assert all(torch.equal(now, value) for now, value in zip(here, first))


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_sharded_tensor_is_put_together_and_any_other_stays_as_it_is() -> None:
    whole = torch.arange(6.0).view(3, 2)
    assert full_tensor(whole) is whole
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
    together = full_tensor(sharded)
    assert isinstance(sharded, DTensor) and not isinstance(together, DTensor)
    assert torch.equal(together, whole)
