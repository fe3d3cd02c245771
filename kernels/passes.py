"""The passes of prefix attention, as a backend asks for them."""

from .backward import backward, empty_gradients
from .forward import empty_outputs, forward

__all__ = ["backward", "empty_gradients", "empty_outputs", "forward"]
