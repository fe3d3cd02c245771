"""Training in two processes on the CPU: plain data parallelism, and a backbone sharded by FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qtuning_fast.model import distributed
from qtuning_fast.model.distributed import (
    ProcessLostError,
    dealt_in_turn,
    from_first,
    full_tensor,
    gathered,
    share_of,
    sum_gradients,
    synchronize,
)

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


@pytest.fixture
def be_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def be(number: int, count: int) -> None:
        monkeypatch.setattr(distributed, "process_number", lambda: number)
        monkeypatch.setattr(distributed, "process_count", lambda: count)

    return be


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8])
def test_shares_make_up_the_whole_and_differ_by_one(be_process: Callable[[int, int], None], size: int) -> None:
    shares = []
    for number in range(3):
        be_process(number, 3)
        shares.append(list(range(size))[share_of(size)])
    assert [place for share in shares for place in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_is_dealt_in_turn_comes_back_in_order(
    be_process: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dealt_in_turn(4, str) == ["0", "1", "2", "3"]
    be_process(1, 3)

    def gathered_from(mine: Callable[[], list[str]]) -> list[list[str]]:
        assert mine() == ["1", "4"]
        return [["0", "3"], mine(), ["2"]]

    monkeypatch.setattr(distributed, "gathered_from", gathered_from)
    assert dealt_in_turn(5, str) == ["0", "1", "2", "3", "4"]


def test_only_the_first_process_computes_and_its_error_is_raised_in_all(
    be_process: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong() -> None:
        raise ValueError("wrong")

    told: list[Any] = []
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects: told.extend(objects))
    be_process(0, 2)
    assert from_first(lambda: 3) == 3
    with pytest.raises(ValueError, match="wrong"):
        from_first(wrong)
    be_process(1, 2)
    for value, error in told:
        monkeypatch.setattr(dist, "broadcast_object_list", lambda here, x=(value, error): here.__setitem__(0, x))
        if error is None:
            assert from_first(lambda: pytest.fail("computed")) == value
        else:
            with pytest.raises(ValueError, match="wrong"):
                from_first(lambda: pytest.fail("computed"))


def test_a_process_that_has_gone_is_an_error_of_its_own(
    be_process: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer [::1]:1\nmore")

    be_process(1, 2)
    monkeypatch.setattr(dist, "all_gather_object", closed)
    with pytest.raises(ProcessLostError, match=r"process 1 of 2 has lost another one.*\(Connection closed.*:1\)$"):
        gathered(1)


def test_gradients_are_summed_and_stay_absent_where_none_has_one(
    be_process: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    be_process(0, 2)
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 2), 2.0)
    theirs = torch.tensor([1.0, 1.0, 0.0, 10.0, *[0.5] * 4, *[3.0] * 4, *[0.0] * 4])  # has each one; value; gradients

    def all_gather(every: list[torch.Tensor], mine: torch.Tensor) -> None:
        every[0].copy_(mine)
        every[1].copy_(theirs)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    [value] = sum_gradients(parameters, torch.tensor(1.0))
    assert value == 11
    assert torch.equal(parameters[0].grad, torch.full((2, 2), 2.5))
    assert torch.equal(parameters[1].grad, torch.full((2, 2), 3.0))
    assert parameters[2].grad is None
