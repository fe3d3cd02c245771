"""A tiny run to serve, and what may be sent to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

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
