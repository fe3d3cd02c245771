"""Prefix attention inside transformers models.

Importing this registers `attn_implementation="qtuning_fast"` with transformers' attention and mask interfaces.
"""

from qtuning_fast.integrations.transformers.injector import PrefixInjector
from qtuning_fast.integrations.transformers.interface import NAME
from qtuning_fast.integrations.transformers.layers import AttentionLayer, main_input, without_head
from qtuning_fast.integrations.transformers.offload import input_device, loaded

__all__ = ["NAME", "AttentionLayer", "PrefixInjector", "input_device", "loaded", "main_input", "without_head"]
