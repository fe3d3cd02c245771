"""What `training.json` records of a task beside its sizes: its steps, and the parts of the method after them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from qtuning_fast.lifelong.task_trainer import TaskTrainer
from qtuning_fast.model.model import QTuningModel

NO_STEPS: dict[str, Any] = {
    "steps": 0,
    "step_seconds": None,
    "best_step": None,
    "loss_curve": [],
    "retention_curve": [],
    "validation_curve": [],
}


def steps_record(trainer: TaskTrainer, metric: str) -> dict[str, Any]:
    """The steps of a task that has been trained; `metric` names what its validation measures."""
    history = trainer.state.log_history
    return {
        "steps": trainer.state.global_step,
        "step_seconds": trainer.clock.median,
        "best_step": trainer.best_step,
        "loss_curve": _curve(history, "loss"),
        "retention_curve": _curve(history, "retention_loss"),
        "validation_curve": [[0, trainer.start_score], *_curve(history, f"eval_{metric}")],
    }


def _curve(history: list[dict[str, Any]], name: str) -> list[list[float]]:
    return [[entry["step"], entry[name]] for entry in history if name in entry]


def method_record(model: QTuningModel) -> dict[str, Any]:
    """What the report shows of the queue, the reweighting and the gate after a task."""
    eviction = model.training_prefix.last_eviction
    gates = model.training_prefix.gates
    return {
        "energy_kept": None if eviction is None else float(np.mean(eviction.energy_kept)),
        "effective_rank": None if eviction is None else float(np.mean(eviction.effective_rank)),
        "eviction": None if eviction is None else asdict(eviction),
        "gate": {
            "alpha": [gate.alpha.reshape(-1).tolist() for gate in gates],
            "tau": [gate.tau.reshape(-1).tolist() for gate in gates],
        }
        if gates
        else None,
        "row_weights": None
        if model.qtuning_config.reweighting is None
        else [rows.row_weights().detach().abs().mean(1).tolist() for rows in model.training_prefix.rows],
    }
