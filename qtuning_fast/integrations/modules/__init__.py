"""A gated prefix in the attention modules of PyTorch and timm."""

from qtuning_fast.integrations.modules.replacement import replace_attention, restore_attention

__all__ = ["replace_attention", "restore_attention"]
