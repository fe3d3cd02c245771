"""Progress bars: the stream's, the task's, and a line for each finished task."""

from __future__ import annotations

import io
from types import SimpleNamespace

from rich.console import Console

from qtuning_fast.lifelong.progress import ProgressBars
from qtuning_fast.lifelong.tasks import Examples, Task

TASK = Task("[bold]colours", ["red", "green"], *[Examples(["a"], [0])] * 3, "here")


RESULTS = {
    "live_queue": [0.25, 0.75],
    "task_adapter": 0.875,
    "class_incremental": {"accuracy": [0.5, 1.0]},
}


def test_bars_follow_the_run_and_a_finished_task_leaves_a_line() -> None:
    console = Console(file=io.StringIO(), width=100)
    with ProgressBars(3, "toy", console) as bars:
        stream, steps = bars.progress.tasks
        bars.task_begins(1, TASK)
        assert stream.completed == 1 and stream.total == 3 and steps.visible
        bars.stage_begins("training")
        assert steps.description == "  [bold]colours: training"
        bars.step_callback(8).on_step_end(None, SimpleNamespace(global_step=5), None)  # type: ignore[arg-type]
        assert (steps.completed, steps.total) == (5, 8)
        bars.task_ends(1, TASK, {"accuracy": 0.5}, RESULTS)
        assert stream.completed == 2 and not steps.visible
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert " 2. [bold]colour adapter 0.875, probe 0.500; so far live 0.500, not named 0.750\n" in printed
