"""What is recorded of a task's training, with steps and without."""

from types import SimpleNamespace
from typing import Any

from transformers import BertModel, TrainerState

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.lifelong.training_record import NO_STEPS, method_record, steps_record


def test_curves_are_what_was_logged_at_which_step() -> None:
    history = [
        {"step": 2, "loss": 0.7},
        {"step": 2, "eval_accuracy": 0.5},
        {"step": 4, "loss": 0.6, "retention_loss": -0.1},
    ]
    state = TrainerState(global_step=4, best_global_step=2, log_history=history)
    clock = SimpleNamespace(median=0.25)
    trainer: Any = SimpleNamespace(state=state, clock=clock, start_score=0.25, best_step=2)
    assert steps_record(trainer, "accuracy") == {
        "steps": 4,
        "step_seconds": 0.25,
        "best_step": 2,
        "loss_curve": [[2, 0.7], [4, 0.6]],
        "retention_curve": [[4, -0.1]],
        "validation_curve": [[0, 0.25], [2, 0.5]],
    }
    assert NO_STEPS.keys() == steps_record(trainer, "accuracy").keys()


def test_the_parts_of_the_method_are_recorded_as_far_as_there_are_any(tiny_bert: BertModel) -> None:
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=2, shared_length=0, queue_size=2, retention_weight=0))
    for number in range(3):
        model.start_task(f"task-{number}", 2)
        model.finish_task()
    record = method_record(model)
    assert record["eviction"]["policy"] == "pca" and 0 < record["energy_kept"] <= 1
    assert len(record["gate"]["alpha"]) == 3 and [len(layer) for layer in record["row_weights"]] == [2, 2, 2]
    bare = QTuningModel(model.detach(), QTuningConfig(prompt_length=2, queue_size=1, gate=None, reweighting=None))
    record = method_record(bare)
    assert record["eviction"] is record["gate"] is record["energy_kept"] is record["row_weights"] is None
