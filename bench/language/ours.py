"""The arms of this library: a stream as LifelongTrainer learns it, asked for nothing but what the study compares."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qtuning_fast.bench.language.arms import Learned
from qtuning_fast.lifelong.trainer import LifelongTrainer
from qtuning_fast.model.checked_files import write_tensors
from qtuning_fast.model.model import QTuningModel


class OwnAdapters(LifelongTrainer):
    """Learns tasks as a run does, and asks each task's own adapter alone.

    A run's probe, its live queue and its answers without the task's name take most of its time, and nothing here is
    compared with them.
    """

    def learn(self, *, together: bool) -> list[Learned]:
        """Learn all tasks: in order by one model, or each alone with an empty queue."""
        numbers = range(len(self.tasks))
        if together:
            with self._attached(alone=True) as model:
                return [self._learn(model, number) for number in numbers]
        learned = []
        for number in numbers:
            with self._attached(alone=True) as model:
                learned.append(self._learn(model, number))
        return learned

    def _learn(self, model: QTuningModel, number: int) -> Learned:
        task, folder = self.tasks[number], self._task_folder(number)
        record = self._train_task(model, number, folder / "checkpoints")
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / write_tensors(folder, "adapter", model.adapters[task.name].tensors())["file"]
        size = file.stat().st_size
        shutil.rmtree(folder)
        return Learned(
            task.name,
            self._score(model, task),
            trained_parameters=self._trained,
            stored_bytes=size,
            step_seconds=record["step_seconds"],
            best_step=record["best_step"],
        )

    def _take_steps(self, model: QTuningModel, number: int, train: Any, previous: str | None, checkpoints: Path) -> Any:
        self._trained = sum(each.numel() for group in model.parameter_groups().values() for each in group)
        return super()._take_steps(model, number, train, previous, checkpoints)
