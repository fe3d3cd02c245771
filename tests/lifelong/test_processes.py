"""Runs in several processes: the numbers of one process, one writer, and what processes tell each other."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from qtuning_fast import LifelongTrainer, QTuningConfig
from qtuning_fast.lifelong import processes
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.lifelong.processes import agree, joined, own_folder, show_once
from qtuning_fast.lifelong.runs import RunSettings, run_stream
from qtuning_fast.model.checked_files import read_json

SCRIPT = Path(__file__).with_name("processes_run.py")
TIMES = {"seconds", "start_seconds", "step_seconds"}
WHERE = {"versions", "device", "processes"}


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What a launcher sets."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    path = os.pathsep.join(path for path in sys.path if path)
    more = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return os.environ | more | {name: str(value) for name, value in ranks.items()}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def started(runs: dict[str, RunSettings], folder: Path, count: int) -> list[subprocess.Popen[str]]:
    """Processes in the folders 0, 1 and so on."""
    (folder / "settings").write_bytes(pickle.dumps(runs))
    port = free_port()
    found = []
    for rank in range(count):
        (folder / str(rank)).mkdir(exist_ok=True)
        command = [sys.executable, str(SCRIPT), str(folder / "settings")]
        given = {"cwd": folder / str(rank), "env": environment(rank, count, port), "text": True}
        found.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **given))
    return found


def finish(running: list[subprocess.Popen[str]]) -> None:
    said = [each.communicate(timeout=300)[0] for each in running]
    assert [each.returncode for each in running] == [0] * len(running), "\n".join(said)


def listening(tasks: Any, title: str) -> Any:
    return nullcontext(RunListener())


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    tasks = [{name: x for name, x in task.items() if name not in TIMES} for task in metrics["per_task"]]
    return {name: x for name, x in metrics.items() if name not in WHERE} | {"per_task": tasks}


def assert_close(found: Any, expected: Any) -> None:
    """All numbers within 1e-4, everything else equal."""
    if isinstance(expected, float) and isinstance(found, float):
        assert found == pytest.approx(expected, abs=1e-4)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, each in expected.items():
            assert_close(found[name], each)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert_close(one, other)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def q_tuning(toy_files: dict[str, Path], tiny_model_folder: Path) -> RunSettings:
    """The defaults but for sizes: donors and heads in closed form, a queue that overflows twice, and memory retention.

    Batches are odd, and a pass over the examples of a task ends with a smaller one.
    """
    data = DataOptions(
        tasks=tuple(f"{name}={path}" for name, path in toy_files.items()), shots=4, validation_shots=3, test_size=11
    )
    method = QTuningConfig(prompt_length=2, shared_length=2, queue_size=2, retention_weight=1.0)
    return RunSettings(
        str(tiny_model_folder), data, method, TrainingOptions(steps=4, batch_size=5, max_length=10, eval_every=2)
    )


@pytest.fixture(scope="module")
def others(
    q_tuning: RunSettings,
    folders_of_models: dict[str, Path],
    toy_texts: dict[str, Path],
    toy_images: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, RunSettings]:
    """What weighs by tokens or by labels, and what compares all examples of a batch."""
    several, many = (
        tmp_path_factory.mktemp("labels") / "several.csv",
        ["red;green", "green;blue", "red", "blue", "red;blue"],
    )
    several.write_text("\n".join(["text,label", *(f"the {a} {n} old,{a}" for n in range(9) for a in many)]))
    texts = tuple(f"{name}={path}" for name, path in toy_texts.items())
    images = tuple(f"{name}={path}" for name, path in toy_images.items())
    data = replace(q_tuning.data, tasks=texts)
    method = replace(q_tuning.method, queue_size=1)
    training = replace(q_tuning.training, head_start="random", batch_size=3)
    return {
        "text-to-text": RunSettings(
            str(folders_of_models["text-to-text"]), data, replace(method, task_type="text-to-text"), q_tuning.training
        ),
        "causal-lm": RunSettings(
            str(folders_of_models["causal-lm"]), data, replace(method, task_type="causal-lm"), q_tuning.training
        ),
        "images": RunSettings(
            str(folders_of_models["image-classification"]),
            replace(data, tasks=images),
            replace(method, task_type="image-classification"),
            replace(training, contrast=0.1, joint_head="covariance", joint_epochs=2, augment="crops"),
        ),
        "several labels": RunSettings(
            q_tuning.model,
            replace(
                data,
                tasks=(*q_tuning.data.tasks[:1], f"several={several}"),
                problem_types=("several=multi_label_classification",),
            ),
            method,
            training,
        ),
    }


@pytest.fixture(scope="module")
def alone(q_tuning: RunSettings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return numbers(run_stream(q_tuning, tmp_path_factory.mktemp("alone") / "run", listening))


def results(folder: Path) -> dict[str, Any]:
    return numbers(read_json(folder / "metrics.json"))


def test_two_processes_come_to_what_one_comes_to_and_only_the_first_writes(
    q_tuning: RunSettings, alone: dict[str, Any], tmp_path: Path
) -> None:
    assert [task["eviction"] is not None for task in alone["per_task"]] == [False, False, True, True]
    assert alone["per_task"][-1]["retention_curve"]
    finish(started({"run": q_tuning}, tmp_path, 2))
    assert_close(results(tmp_path / "0" / "run"), alone)
    assert read_json(tmp_path / "0" / "run" / "metrics.json")["processes"] == 2
    assert (tmp_path / "0" / "run" / "report.html").exists()
    assert not list((tmp_path / "1").iterdir())


@pytest.mark.thorough
def test_all_kinds_of_loss_come_to_what_one_process_comes_to(others: dict[str, RunSettings], tmp_path: Path) -> None:
    finish(started(others, tmp_path, 2))
    for name, settings in others.items():
        assert_close(results(tmp_path / "0" / name), numbers(run_stream(settings, tmp_path / name, listening)))


@pytest.mark.thorough
def test_there_may_be_more_processes_than_examples(q_tuning: RunSettings, tmp_path: Path) -> None:
    few = replace(q_tuning, data=replace(q_tuning.data, shots=1, tasks=q_tuning.data.tasks[::2]))
    few = replace(few, method=replace(few.method, queue_size=1))
    alone = numbers(run_stream(few, tmp_path / "alone", listening))
    assert alone["per_task"][0]["num_train"] == 2 and alone["per_task"][1]["retention_curve"]
    finish(started({"run": few}, tmp_path, 3))
    assert_close(results(tmp_path / "0" / "run"), alone)


@pytest.mark.thorough
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_in_a_task_a_run_goes_on(
    q_tuning: RunSettings, alone: dict[str, Any], tmp_path: Path, killed: int
) -> None:
    running = started({"run": q_tuning}, tmp_path, 2)
    wait_for(tmp_path / "0" / "run" / "tasks" / "02-warm" / "checkpoints" / "checkpoint-2", running)
    running[killed].send_signal(signal.SIGKILL)
    left = running[1 - killed]
    said, _ = left.communicate(timeout=60)  # nobody else ends it
    assert left.returncode == 1 and "ProcessLostError" in said
    running[killed].communicate()
    finish(started({"run": q_tuning}, tmp_path, 2))
    assert_close(results(tmp_path / "0" / "run"), alone)


def wait_for(path: Path, running: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 200
    while not path.exists() and time.monotonic() < deadline:
        assert all(each.poll() is None for each in running), [each.communicate()[0] for each in running]
        time.sleep(0.02)


# What processes tell each other


class Store:
    """A store that nobody else writes to."""

    def __init__(self, **content: str) -> None:
        self.content = content

    def set(self, name: str, text: str) -> None:
        self.content[name] = text

    def get(self, name: str) -> bytes:
        return self.content[name].encode()

    def wait(self, names: list[str], timeout: Any) -> None:
        if not set(names) <= self.content.keys():
            raise RuntimeError("timeout")


@pytest.mark.parametrize(
    ("me", "said", "shown"),
    [
        (0, {}, ["wrong"]),
        (1, {"0": "wrong"}, []),
        (1, {"0": "other"}, ["process 1: wrong"]),
        (1, {}, ["process 1: wrong"]),
    ],
)
def test_an_error_of_all_is_shown_by_the_first_and_one_of_its_own_by_each(
    monkeypatch: pytest.MonkeyPatch, me: int, said: dict[str, str], shown: list[str]
) -> None:
    monkeypatch.setattr(processes, "process_number", lambda: me)
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    monkeypatch.setattr(processes._meeting, "store", Store(**said))
    found: list[str] = []
    show_once("wrong", found.append)
    assert found == shown


def test_a_setting_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    agree({"steps": 3})
    monkeypatch.setattr(processes, "gathered", lambda mine: [mine, mine, mine | {"seed": 2}])
    with pytest.raises(
        ValueError, match=r"^seed is 2 in process 2, but 1 in process 0; all processes must have the same"
    ):
        agree({"steps": 3, "seed": 1})


def test_only_the_first_process_has_the_folder_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "one.json").write_text("{}")
    (tmp_path / ".lock").write_text("")
    (tmp_path / "report.html").write_text("what no run goes on from")
    monkeypatch.setattr(processes, "from_first", lambda compute: compute())
    with own_folder(tmp_path) as folder:
        assert folder == tmp_path
    monkeypatch.setattr(processes, "process_count", lambda: 2)
    for number, itself in ((0, True), (1, False)):
        monkeypatch.setattr(processes, "process_number", lambda number=number: number)
        with own_folder(tmp_path) as folder:
            assert (folder == tmp_path) == itself
            assert (folder / "tasks" / "one.json").read_text() == "{}"
            assert not (folder / "adapter").exists() and (folder / "report.html").exists() == itself
        assert folder.exists() == itself


def test_copies_of_killed_processes_are_removed_once_they_are_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    for name, age in (("old", 7200), ("new", 0)):
        folder = tmp_path / f"qtuning-process-{name}"
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    processes._remove_abandoned()
    assert [path.name for path in tmp_path.iterdir()] == ["qtuning-process-new"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def launch(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


def test_a_single_process_of_a_launcher_needs_no_group(launched: Callable[..., None]) -> None:
    launched(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0")
    with joined():
        assert "LOCAL_RANK" not in os.environ and not dist.is_initialized()
    assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, "configured for FSDP"),
        ({"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}, "configured for mixed precision"),
    ],
)
def test_launchers_that_do_not_suit(launched: Callable[..., None], variables: dict[str, str], said: str) -> None:
    launched(**variables)
    with pytest.raises(ValueError, match=said), joined():
        pytest.fail("joined")


def test_a_trainer_of_processes_that_have_not_joined(
    launched: Callable[..., None], q_tuning: RunSettings, tmp_path: Path
) -> None:
    tasks = replace(q_tuning.data, tasks=q_tuning.data.tasks[:1]).load()
    trainer = LifelongTrainer(
        *load_base_model(q_tuning.model), q_tuning.method, tasks, q_tuning.training, tmp_path / "run"
    )
    launched(WORLD_SIZE="2")
    with pytest.raises(ValueError, match=r"2 processes; run within .*joined\(\)"):
        trainer.run()


@pytest.mark.parametrize(("visible", "own"), [(None, "1"), ("4,6", "6")])
def test_each_process_sees_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch, visible: str | None, own: str) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("torch.cuda.init", lambda: asked.append(True))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1 if asked else 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match="there are 2 GPUs here, but a process for GPU 2"):
        processes._see_own_gpu(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "0,1")  # and back at the end
    processes._see_own_gpu(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own


def test_nothing_asks_for_gpus_before_processes_join() -> None:
    """Asking fixes which GPUs a process sees."""
    code = (
        "import sys, torch; torch.cuda.is_available = torch.cuda.init = lambda: sys.exit('asked');"
        "import qtuning_fast.cli, qtuning_fast.lifelong.processes"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(0, 1, 0), timeout=120)
