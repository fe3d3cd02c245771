"""The operator: attention over a gated prefix and the context."""

from qtuning_fast.attention.api import attention_with_weights, explain_backend, prefix_attention
from qtuning_fast.attention.dispatch import BackendChoice

__all__ = ["BackendChoice", "attention_with_weights", "explain_backend", "prefix_attention"]
