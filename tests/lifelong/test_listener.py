"""What a run tells its listener, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qtuning_fast import LifelongTrainer, QTuningConfig
from qtuning_fast.lifelong import RunListener, Task, TrainingOptions, load_base_model, load_task


class Notes(RunListener):
    def __init__(self) -> None:
        self.told: list[str] = []

    def task_begins(self, number: int, task: Task) -> None:
        self.told.append(f"begin {number} {task.name}")

    def stage_begins(self, stage: str) -> None:
        self.told.append(stage)

    def task_ends(self, number: int, task: Task, probe: dict[str, Any], evaluation: dict[str, Any]) -> None:
        assert 0 <= probe["accuracy"] <= 1 and len(evaluation["live_queue"]) == number + 1
        assert len(evaluation["class_incremental"]["accuracy"]) == number + 1
        self.told.append(f"end {number} {task.name}")


def test_a_listener_hears_every_task_and_stage_once(
    toy_files: dict[str, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    tasks = [load_task(str(toy_files[name]), shots=2, validation_shots=2, test_size=4) for name in ("colours", "warm")]
    config = QTuningConfig(prompt_length=2, shared_length=2)
    options = TrainingOptions(steps=1, batch_size=2, max_length=10)
    model = load_base_model(str(tiny_model_folder))

    def run() -> list[str]:
        notes = Notes()
        LifelongTrainer(*model, config, tasks, options, tmp_path / "run", listener=notes).run()
        return notes.told

    stages = ["probe", "training", "evaluation", "class_incremental"]
    assert run() == ["begin 0 colours", *stages, "end 0 colours", "begin 1 warm", *stages, "end 1 warm"]
    assert run() == ["begin 0 colours", "end 0 colours", "begin 1 warm", "end 1 warm"]  # nothing is left to do


def test_the_base_class_may_be_used_as_it_is() -> None:
    listener = RunListener()
    listener.stage_begins("probe")
    assert isinstance(listener.step_callback(3), TrainerCallback)
