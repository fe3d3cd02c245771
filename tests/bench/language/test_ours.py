"""The arms of this library are what a run of LifelongTrainer learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtuning_fast.bench.language.arms import MODELS
from qtuning_fast.bench.language.ours import OwnAdapters
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.lifelong.trainer import LifelongTrainer

OPTIONS = TrainingOptions(steps=20, eval_every=10, batch_size=8, max_length=12, seed=1, prompt_rate=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_accuracies_are_those_of_a_run(
    name: str, loaded: Callable[..., Any], toy_tasks: list[Task], tmp_path: Path
) -> None:
    base, tokenizer, _ = loaded(name)
    config = MODELS[name].config(prompt_length=3, shared_length=2)
    metrics = LifelongTrainer(base, tokenizer, config, toy_tasks, OPTIONS, tmp_path / "run").run()
    learner = OwnAdapters(base, tokenizer, config, toy_tasks, OPTIONS, tmp_path / "ours")
    together, alone = learner.learn(together=True), learner.learn(together=False)
    assert [each.name for each in together] == [each.name for each in alone] == ["colours", "pets"]
    assert [each.accuracy for each in together] == metrics["task_adapter"]["accuracy_matrix"][-1]
    assert [each.best_step for each in together] == [task["best_step"] for task in metrics["per_task"]]
    assert alone[0].accuracy == together[0].accuracy
    # Behind a queue a task stores the rows of the first one, too, and trains their weights.
    assert alone[0].stored_bytes == together[0].stored_bytes == alone[1].stored_bytes < together[1].stored_bytes
    assert alone[1].trained_parameters < together[1].trained_parameters
    gates = 2 * 2  # alpha and tau of both layers
    width = {"smollm2": 32, "flan-t5": 24}[name]
    assert alone[0].trained_parameters == (3 + 2) * 2 * 2 * width + gates
    assert all(each.step_seconds for each in together)
    assert not [path for path in (tmp_path / "ours").rglob("*") if path.is_file()]
