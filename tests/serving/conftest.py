"""A tiny run to serve, and what may be sent to it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from qtuning_fast import QTuningConfig
from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.lifelong.runs import RunSettings, run_stream
from qtuning_fast.model.checked_files import read_json
from qtuning_fast.serving.options import ServingOptions

pytest.importorskip("pydantic", reason="serving needs pydantic: pip install 'qtuning_fast[serve]'")

from qtuning_fast.serving.engine import Engine
from qtuning_fast.serving.schema import SentAdapter

ROOT = Path(__file__).parents[2]
Sending = Callable[..., SentAdapter]


@pytest.fixture(scope="session")
def finished_run(toy_files: dict[str, Path], tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three toy tasks with two, three and two classes."""
    folder = tmp_path_factory.mktemp("served") / "run"
    tasks = tuple(f"{name}={toy_files[name]}" for name in ("colours", "animals", "warm"))
    data = DataOptions(tasks=tasks, shots=4, validation_shots=3, test_size=8)
    method = QTuningConfig(prompt_length=2, shared_length=2, queue_size=2)
    training = TrainingOptions(steps=2, batch_size=4, max_length=16, eval_every=2)
    settings = RunSettings(str(tiny_model_folder), data, method, training)
    run_stream(settings, folder, lambda tasks, title: nullcontext(RunListener()))
    return folder


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of it, whose adapters may be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def engine(run: Path) -> Engine:
    return Engine(run, ServingOptions())


@pytest.fixture(scope="session")
def sending(finished_run: Path) -> Sending:
    """Returns the adapter of a task of the run as it is sent; parts of it may be replaced."""

    def send(task: str = "colours", **changed: Any) -> SentAdapter:
        folder = finished_run / "adapter"
        index = folder / "adapter_config.json"
        (entry,) = [each for each in read_json(index)["tasks"] if each["name"] == task]
        parts = {
            "index": index.read_bytes(),
            "tensors": (folder / entry["file"]).read_bytes(),
            "statistics": (folder / entry["statistics"]["file"]).read_bytes(),
            "name_in_index": task,
        }
        return SentAdapter(**(parts | changed))

    return send


KEY, ADMIN = "a-key-that-asks-1", "a-key-of-an-admin"


class Server:
    """`qtuning-fast serve` in a process of its own.

    Args:
        run: folder of the run.
        options: further options of the command.
    """

    def __init__(self, run: Path, *options: str) -> None:
        self.port, self.metrics_port = _free_port(), _free_port()
        command = [sys.executable, "-c", "from qtuning_fast.cli import main; main()", "serve", f"--run={run}"]
        ports = [f"--port={self.port}", f"--metrics-port={self.metrics_port}"]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "QTUNING_FAST_KEYS": KEY,
            "QTUNING_FAST_ADMIN_KEYS": ADMIN,
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [*command, *ports, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.said: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if line.startswith("Serving at"):
                return
        raise AssertionError("\n".join(self.said))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def replicas(self) -> list[psutil.Process]:
        """The processes that hold the model."""
        return [
            each
            for each in psutil.Process(self.process.pid).children(recursive=True)
            if each.name().startswith("ray::Serve") and ":Engine" in " ".join(each.cmdline())
        ]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send it a signal, SIGINT to its process group, too, as a terminal does; return its status and all it said."""
        if self.process.poll() is None:
            (os.kill if number == signal.SIGTERM else os.killpg)(self.process.pid, number)
        rest, _ = self.process.communicate(timeout=120)
        return self.process.returncode, "\n".join([*self.said, rest])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="session")
def serving() -> Callable[..., Server]:
    """Starts a server; whoever starts it ends it."""
    pytest.importorskip("ray", reason="serving needs ray: pip install 'qtuning_fast[serve]'")
    return Server
