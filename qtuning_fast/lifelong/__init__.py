"""Streams of tasks, the trainer that learns them one after another, and what it reports."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtuning_fast.lifelong.base_models import load_base_model
    from qtuning_fast.lifelong.data.loading import load_examples, load_task
    from qtuning_fast.lifelong.data.tables import DataWarning
    from qtuning_fast.lifelong.listener import RunListener
    from qtuning_fast.lifelong.methods import Method, method_by_name
    from qtuning_fast.lifelong.metrics import evaluation_summary
    from qtuning_fast.lifelong.options import TrainingOptions
    from qtuning_fast.lifelong.processes import joined
    from qtuning_fast.lifelong.streams import load_stream
    from qtuning_fast.lifelong.tasks import Examples, Task, few_shot_split
    from qtuning_fast.lifelong.trainer import LifelongTrainer

__all__ = [
    "DataWarning",
    "Examples",
    "LifelongTrainer",
    "Method",
    "RunListener",
    "Task",
    "TrainingOptions",
    "evaluation_summary",
    "few_shot_split",
    "joined",
    "load_base_model",
    "load_examples",
    "load_stream",
    "load_task",
    "method_by_name",
]

# Imported on first use: reading data should not wait for transformers.
_MODULES = {
    "DataWarning": "data.tables",
    "Examples": "tasks",
    "LifelongTrainer": "trainer",
    "Method": "methods",
    "RunListener": "listener",
    "Task": "tasks",
    "TrainingOptions": "options",
    "evaluation_summary": "metrics",
    "few_shot_split": "tasks",
    "joined": "processes",
    "load_base_model": "base_models",
    "load_examples": "data.loading",
    "load_stream": "streams",
    "load_task": "data.loading",
    "method_by_name": "methods",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
