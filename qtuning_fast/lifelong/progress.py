"""Progress bars of a run: one for the stream, one for the steps of the current task."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.tasks import Task


class ProgressBars(RunListener):
    """Shows the progress of a run. Without a terminal, it prints a line for each finished task.

    Use it as a context manager.

    Args:
        tasks: the number of tasks in the stream.
        title: the title of the stream's bar.
    """

    def __init__(self, tasks: int, title: str, console: Console | None = None) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console or Console(),
            speed_estimate_period=3600,  # a task takes minutes, and the stream's bar moves once a task
        )
        self._stream = self.progress.add_task(title, total=tasks)
        self._steps = self.progress.add_task("", total=None, visible=False)

    def __enter__(self) -> ProgressBars:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def task_begins(self, number: int, task: Task) -> None:
        self.progress.update(self._stream, completed=number)
        self._task = task.name
        self.progress.reset(self._steps, total=None, visible=True)

    def stage_begins(self, stage: str) -> None:
        self.progress.update(self._steps, description=f"  {self._task[:16]}: {stage}")

    def task_ends(self, number: int, task: Task, probe: dict[str, Any], evaluation: dict[str, Any]) -> None:
        self.progress.update(self._stream, completed=number + 1)
        self.progress.update(self._steps, visible=False)
        live, unnamed = evaluation["live_queue"], evaluation["class_incremental"]["accuracy"]
        self.progress.console.print(
            f"{number + 1:>2}. {task.name[:12]:<12} adapter {evaluation['task_adapter']:.3f}, "
            f"probe {probe[task.metric]:.3f}; so far live {fmean(live):.3f}, not named {fmean(unnamed):.3f}",
            markup=False,
            highlight=False,
        )

    def step_callback(self, steps: int) -> TrainerCallback:
        return _StepBar(self.progress, self._steps, steps)


class _StepBar(TrainerCallback):
    def __init__(self, progress: Progress, bar: Any, steps: int) -> None:
        self.progress, self.bar, self.steps = progress, bar, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step, total=self.steps)
