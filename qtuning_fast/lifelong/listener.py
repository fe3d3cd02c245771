"""Callbacks of a run."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from qtuning_fast.lifelong.tasks import Task


class RunListener:
    """Is told what a run does while it goes on. This base class does nothing; override what you need."""

    def task_begins(self, number: int, task: Task) -> None: ...

    def stage_begins(self, stage: str) -> None: ...

    def task_ends(self, number: int, task: Task, probe: dict[str, Any], evaluation: dict[str, Any]) -> None: ...

    def step_callback(self, steps: int) -> TrainerCallback:
        """A callback for the training of one task of so many steps."""
        return TrainerCallback()
