"""Prompts inside attention, fast: Q-tuning's bounded prompt queue and NoRGa's gate on one operator."""

from qtuning_fast.version import __version__

__all__ = ["__version__"]
