"""The passes of prefix attention in the form that a backend needs."""

from .backward import backward, empty_gradients
from .forward import empty_outputs, forward

__all__ = ["backward", "empty_gradients", "empty_outputs", "forward"]
