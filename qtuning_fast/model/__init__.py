"""A frozen transformers model that learns one task after another."""

from qtuning_fast.model.finished import QTuningOutput
from qtuning_fast.model.model import QTuningModel

__all__ = ["QTuningModel", "QTuningOutput"]
