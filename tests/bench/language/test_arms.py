"""The arms, draws and tasks are what the declaration says of them."""

from __future__ import annotations

from qtuning_fast.bench.language.arms import (
    ARMS,
    DRAWS,
    MODELS,
    OURS,
    RATES,
    STREAM,
    TUNING_TASKS,
    all_runs,
    arms_of,
    rate_runs,
    tasks_of,
    tuning_task,
)
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.method.config import QTuningConfig


def test_what_is_run() -> None:
    runs = all_runs()
    draws = {
        (model, arm): [run.draw for run in runs if (run.model, run.arm) == (model, arm)]
        for model in MODELS
        for arm in ARMS
    }
    every = list(range(1, DRAWS + 1))
    assert {arm for arm in ARMS if draws["smollm2", arm] == every} == {"zero-shot", "in-context"}
    assert {arm for arm in ARMS if draws["smollm2", arm] == [1, 2]} == {*RATES, *OURS}
    assert {arm for arm in ARMS if draws["flan-t5", arm] == every} == {*ARMS} - {"in-context"} == {*arms_of("flan-t5")}
    assert len({run.name for run in runs}) == len(runs) == 57
    rates = rate_runs()
    assert len({run.name for run in rates}) == len(rates) == 2 * 3 * 3 * 2
    assert not {run.task for run in rates} & {source.name for source in STREAM.sources}


def test_the_default_is_the_librarys() -> None:
    for model in MODELS.values():
        assert model.config(**OURS["default"].config) == QTuningConfig(task_type=model.task_type, queue_size=5)
        options = model.options(3, rehearsal=False)
        differs = {"steps": model.steps, "batch_size": 8, "max_length": 80, "eval_every": 20, "seed": 3}
        assert options == TrainingOptions(**differs)  # type: ignore[arg-type]
        gate = model.config(**OURS["no gate"].config)
        assert gate.gate is None and not OURS["no queue"].together and OURS["no gate"].together


def test_tasks() -> None:
    tasks = tasks_of(1, rehearsal=False)
    assert [task.name for task in tasks] == ["trec", "r8", "airlines"]
    for task in [*tasks, *(tuning_task(name, rehearsal=False) for name in TUNING_TASKS)]:
        classes = len(task.label_names)
        assert (len(task.train), len(task.validation), len(task.test)) == (16 * classes, 16 * classes, 100)
        assert task.template is not None
    [first] = tasks_of(1, rehearsal=True)
    assert (first.name, len(first.test)) == ("trec", 8)
