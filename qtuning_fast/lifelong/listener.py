"""The events of a run, for progress bars and the like."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from qtuning_fast.lifelong.tasks import Task


class RunListener:
    """Receives the events of a run. This base class ignores them; override the methods that you need."""

    def task_begins(self, number: int, task: Task) -> None: ...

    def stage_begins(self, stage: str) -> None: ...

    def task_ends(self, number: int, task: Task, probe: dict[str, Any], evaluation: dict[str, Any]) -> None:
        """A task is learned and evaluated.

        Args:
            number: its number, from 0.
            task: the task.
            probe: the linear probe's measure.
            evaluation: `task_adapter`, this task's measure under its adapter; `live_queue`, that of each task so far
                under the live prefix; `class_incremental`, without the task's name: `accuracy` and `task_found` of each
                task so far.
        """

    def step_callback(self, steps: int) -> TrainerCallback:
        """A transformers callback for the training of one task, which has at most `steps` steps."""
        return TrainerCallback()
