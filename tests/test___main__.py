"""`python -m qtuning_fast` in several processes, as launchers start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtuning_fast.model.checked_files import read_json

SIZES = "--steps 4 --batch-size 3 --max-length 10 --eval-every 2 --prompt-length 2 --shared-length 2 --queue-size 2"
DRAW = "--shots 2 --validation-shots 2 --test-size 6"
MODULE = ["-m", "qtuning_fast"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *MODULE]
# Without a GPU accelerate starts one process, unless it is told that there are some.
ACCELERATE = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", *MODULE),
]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    "NO_COLOR": "1",
    "COLUMNS": "200",
}


@pytest.fixture
def command(toy_files: dict[str, Path], tiny_model_folder: Path) -> list[str]:
    named = [f"--task={name}={path}" for name, path in list(toy_files.items())[:1]]
    return ["run", "--out=run", f"--model={tiny_model_folder}", *named, *SIZES.split(), *DRAW.split()]


def start(arguments: list[str], folder: Path, **variables: object) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=ENVIRONMENT | {name: str(value) for name, value in variables.items()},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def start_by_hand(commands: list[list[str]], folder: Path) -> list[subprocess.Popen[str]]:
    """One process a command, each on a node of its own, as it were."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": found.getsockname()[1], "WORLD_SIZE": len(commands)}
    return [
        start([*MODULE, *each], folder / str(rank), RANK=rank, LOCAL_RANK=0, **where)
        for rank, each in enumerate(commands)
    ]


def said(running: list[subprocess.Popen[str]], code: int) -> list[str]:
    found = [each.communicate(timeout=120)[0] for each in running]
    assert [each.returncode for each in running] == [code] * len(running), found
    return found


def test_processes_that_disagree_end_with_one_error_before_any_work(command: list[str], tmp_path: Path) -> None:
    first, second = said(start_by_hand([command, [*command, "--steps=5"]], tmp_path), 2)
    assert first == "error: --steps is '5' in process 1, but '4' in process 0; all processes must have the same\n"
    assert second == ""
    assert not list((tmp_path / "0").iterdir()) and not list((tmp_path / "1").iterdir())


@pytest.mark.thorough
def test_processes_with_other_data_end_with_one_error(command: list[str], tmp_path: Path) -> None:
    for rank, noun in enumerate(("cat", "dog")):
        (tmp_path / str(rank)).mkdir()
        texts = [f"the {colour} {noun} {n},{colour}" for n in range(20) for colour in ("red", "green")]
        (tmp_path / str(rank) / "mine.csv").write_text("\n".join(["text,label", *texts]))
    first, second = said(start_by_hand([[*command, "--task=mine=mine.csv"]] * 2, tmp_path), 2)
    assert "error: the data of task 'mine' is " in first and first.count("error") == 1
    assert second == ""
    assert not (tmp_path / "0" / "run").exists()


def test_commands_for_one_process_say_so_once(tmp_path: Path) -> None:
    first, second = said(start_by_hand([["report", "--run=run"]] * 2, tmp_path), 2)
    assert first == "error: report runs in one process, but a launcher has started 2; start it without\n"
    assert second == ""


@pytest.mark.thorough
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_launcher_runs_several_seeds_and_evaluates_them(
    command: list[str], tmp_path: Path, launcher: list[str]
) -> None:
    [output] = said([start([*launcher, *command, "--seeds=2"], tmp_path)], 0)
    assert output.count("Report: ") == 1
    for seed in range(2):
        assert read_json(tmp_path / "run" / f"seed-{seed}" / "metrics.json")["processes"] == 2
    assert (tmp_path / "run" / "summary.json").exists()
    evaluate = ["--", "eval", "--run=run/seed-0"]  # otherwise torchrun takes --run for one of its own options
    outputs = said([start([*launcher, *evaluate], tmp_path), start([*MODULE, *evaluate[1:]], tmp_path)], 0)
    assert "colours" in outputs[0] and outputs[0] == outputs[1]


@pytest.mark.thorough
def test_an_interrupt_ends_all_processes_with_one_message(command: list[str], tmp_path: Path) -> None:
    launched = start([*TORCHRUN, *command, "--steps=400", "--eval-every=400"], tmp_path)
    deadline = time.monotonic() + 100
    while not list(tmp_path.rglob("probe.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)
    os.killpg(launched.pid, signal.SIGINT)  # as a terminal does
    output, _ = launched.communicate(timeout=20)
    assert output.count("Interrupted. What is finished is kept: the same command resumes from here.") == 1
    assert "KeyboardInterrupt" not in output and "error:" not in output
