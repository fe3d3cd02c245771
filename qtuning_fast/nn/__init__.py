"""Modules with parameters."""

from qtuning_fast.nn.discriminator import Discriminator, retention_loss
from qtuning_fast.nn.gate import Gate
from qtuning_fast.nn.multihead import PrefixMultiheadAttention
from qtuning_fast.nn.pooling import mean_pool
from qtuning_fast.nn.prefix import LayerPrefix, LayerShape
from qtuning_fast.nn.prefixed import PrefixedAttention
from qtuning_fast.nn.reparameterization import ResidualReparameterization
from qtuning_fast.nn.reweighting import Reweighting

__all__ = [
    "Discriminator",
    "Gate",
    "LayerPrefix",
    "LayerShape",
    "PrefixMultiheadAttention",
    "PrefixedAttention",
    "ResidualReparameterization",
    "Reweighting",
    "mean_pool",
    "retention_loss",
]
