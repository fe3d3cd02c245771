"""Modules with parameters."""

from qtuning_fast.nn.discriminator import Discriminator, retention_loss
from qtuning_fast.nn.gate import Gate
from qtuning_fast.nn.multihead import PrefixMultiheadAttention
from qtuning_fast.nn.pooling import first_token, last_token, mean_pool
from qtuning_fast.nn.prefix import InputPrompt, LayerPrefix, LayerShape, Prefix, PromptRows
from qtuning_fast.nn.prefixed_attention import PrefixedAttention
from qtuning_fast.nn.reparameterization import ResidualReparameterization
from qtuning_fast.nn.reweighting import Reweighting

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
