"""A frozen transformers model that learns one task after another."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtuning_fast.method.adapter import TaskAdapter
    from qtuning_fast.model.checked_files import CorruptFileError
    from qtuning_fast.model.device_slots import AdapterSlots
    from qtuning_fast.model.model import QTuningModel
    from qtuning_fast.model.output import QTuningOutput
    from qtuning_fast.model.registry import AdapterRegistry
    from qtuning_fast.model.scoring import answer_scores

__all__ = [
    "AdapterRegistry",
    "AdapterSlots",
    "CorruptFileError",
    "QTuningModel",
    "QTuningOutput",
    "TaskAdapter",
    "answer_scores",
]

# Imported on first use, so that checked files work without transformers.
_LAZY = {
    "AdapterRegistry": "qtuning_fast.model.registry",
    "AdapterSlots": "qtuning_fast.model.device_slots",
    "CorruptFileError": "qtuning_fast.model.checked_files",
    "QTuningModel": "qtuning_fast.model.model",
    "QTuningOutput": "qtuning_fast.model.output",
    "TaskAdapter": "qtuning_fast.method.adapter",
    "answer_scores": "qtuning_fast.model.scoring",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
