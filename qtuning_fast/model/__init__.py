"""A frozen transformers model that learns one task after another."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtuning_fast.method.adapter import TaskAdapter
    from qtuning_fast.method.statistics import TaskStatistics
    from qtuning_fast.method.task_inference import FittedRule, TaskInference
    from qtuning_fast.method.task_rule import Candidate, Evidence, TaskRule
    from qtuning_fast.method.task_rules import ClosedForm, MostConfident, NearestMean, RanPAC
    from qtuning_fast.method.trained_head import TrainedHead
    from qtuning_fast.model.checked_files import CorruptFileError
    from qtuning_fast.model.device_slots import AdapterSlots
    from qtuning_fast.model.hub import PushOptions
    from qtuning_fast.model.hub_files import DownloadOptions, HubError, NotOnHubError
    from qtuning_fast.model.model import QTuningModel
    from qtuning_fast.model.output import QTuningOutput
    from qtuning_fast.model.registry import AdapterRegistry, StatisticsRegistry
    from qtuning_fast.model.scoring import answer_scores
    from qtuning_fast.model.starting import ChosenStart, Start

__all__ = [
    "AdapterRegistry",
    "AdapterSlots",
    "Candidate",
    "ChosenStart",
    "ClosedForm",
    "CorruptFileError",
    "DownloadOptions",
    "Evidence",
    "FittedRule",
    "HubError",
    "MostConfident",
    "NearestMean",
    "NotOnHubError",
    "PushOptions",
    "QTuningModel",
    "QTuningOutput",
    "RanPAC",
    "Start",
    "StatisticsRegistry",
    "TaskAdapter",
    "TaskInference",
    "TaskRule",
    "TaskStatistics",
    "TrainedHead",
    "answer_scores",
]

# Imported on first use, so that checked files work without transformers.
_LAZY = {
    "AdapterRegistry": "qtuning_fast.model.registry",
    "AdapterSlots": "qtuning_fast.model.device_slots",
    "Candidate": "qtuning_fast.method.task_rule",
    "ChosenStart": "qtuning_fast.model.starting",
    "ClosedForm": "qtuning_fast.method.task_rules",
    "CorruptFileError": "qtuning_fast.model.checked_files",
    "DownloadOptions": "qtuning_fast.model.hub_files",
    "Evidence": "qtuning_fast.method.task_rule",
    "HubError": "qtuning_fast.model.hub_files",
    "MostConfident": "qtuning_fast.method.task_rules",
    "NearestMean": "qtuning_fast.method.task_rules",
    "NotOnHubError": "qtuning_fast.model.hub_files",
    "PushOptions": "qtuning_fast.model.hub",
    "QTuningModel": "qtuning_fast.model.model",
    "QTuningOutput": "qtuning_fast.model.output",
    "RanPAC": "qtuning_fast.method.task_rules",
    "Start": "qtuning_fast.model.starting",
    "StatisticsRegistry": "qtuning_fast.model.registry",
    "TaskAdapter": "qtuning_fast.method.adapter",
    "FittedRule": "qtuning_fast.method.task_inference",
    "TaskInference": "qtuning_fast.method.task_inference",
    "TaskRule": "qtuning_fast.method.task_rule",
    "TaskStatistics": "qtuning_fast.method.statistics",
    "TrainedHead": "qtuning_fast.method.trained_head",
    "answer_scores": "qtuning_fast.model.scoring",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
