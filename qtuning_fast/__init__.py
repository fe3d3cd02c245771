"""Lifelong prompt tuning in fused kernels: Q-tuning's bounded prompt queue and NoRGa's gate in one operator."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qtuning_fast.attention.api import explain_backend, prefix_attention
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.method.queue import PromptQueue, dq_pca
from qtuning_fast.version import __version__

if TYPE_CHECKING:
    from qtuning_fast.integrations.modules import replace_attention, restore_attention
    from qtuning_fast.integrations.modules.multihead import PrefixMultiheadAttention
    from qtuning_fast.lifelong.trainer import LifelongTrainer
    from qtuning_fast.model.model import QTuningModel
    from qtuning_fast.model.scoring import answer_scores

__all__ = [
    "LifelongTrainer",
    "PrefixMultiheadAttention",
    "PromptQueue",
    "QTuningConfig",
    "QTuningModel",
    "__version__",
    "answer_scores",
    "dq_pca",
    "explain_backend",
    "prefix_attention",
    "replace_attention",
    "restore_attention",
]

# Imported on first use: the operator alone should load fast and without transformers.
_LAZY = {
    "LifelongTrainer": "qtuning_fast.lifelong.trainer",
    "PrefixMultiheadAttention": "qtuning_fast.integrations.modules.multihead",
    "QTuningModel": "qtuning_fast.model.model",
    "replace_attention": "qtuning_fast.integrations.modules.replacement",
    "restore_attention": "qtuning_fast.integrations.modules.replacement",
    "answer_scores": "qtuning_fast.model.scoring",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
