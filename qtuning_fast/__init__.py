"""Prompts inside attention, fast: Q-tuning's bounded prompt queue and NoRGa's gate on one operator."""

from qtuning_fast.functional import explain_backend, prefix_attention
from qtuning_fast.version import __version__

__all__ = ["__version__", "explain_backend", "prefix_attention"]
