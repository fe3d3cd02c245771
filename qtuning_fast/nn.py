"""Modules with parameters."""

from qtuning_fast.integrations.modules.multihead import PrefixMultiheadAttention
from qtuning_fast.integrations.modules.prefixed import PrefixedAttention
from qtuning_fast.method.gate import Gate
from qtuning_fast.method.pooling import first_token, last_token, mean_pool
from qtuning_fast.method.prefix import Prefix
from qtuning_fast.method.prompts import InputPrompt, LayerPrefix, LayerShape, PromptRows
from qtuning_fast.method.reparameterization import ResidualReparameterization
from qtuning_fast.method.retention import Discriminator, retention_loss
from qtuning_fast.method.reweighting import Reweighting

__all__ = [
    "Discriminator",
    "Gate",
    "InputPrompt",
    "LayerPrefix",
    "LayerShape",
    "Prefix",
    "PrefixMultiheadAttention",
    "PrefixedAttention",
    "PromptRows",
    "ResidualReparameterization",
    "Reweighting",
    "first_token",
    "last_token",
    "mean_pool",
    "retention_loss",
]
