"""A frozen transformers model as a module whose attention layers take prefixes."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers import AttachedAttention, encoder_of
from qtuning_fast.nn import mean_pool

Attached = TypeVar("Attached", bound="AttachedModel")


class AttachedModel(nn.Module):
    """What `QTuningModel` knows of its base model: frozen, in eval mode, and given back as it was.

    Args:
        base_model: see `QTuningModel`.

    Raises:
        TypeError, ValueError, NotImplementedError: the model cannot be attached to; the message says why.
    """

    accepts_loss_kwargs = False  # transformers.Trainer: forward's **kwargs go to the encoder and are no loss options

    def __init__(self, base_model: PreTrainedModel) -> None:
        super().__init__()
        self.attention = AttachedAttention(base_model)
        self.base_model = base_model
        self._detached = False

    @property
    def encoder(self) -> PreTrainedModel:
        """The base model, or its encoder where the base model has a head."""
        return encoder_of(self.base_model)

    @property
    def hidden_size(self) -> int:
        """Length of a feature vector."""
        return self.encoder.config.hidden_size

    def encode(self, inputs: dict[str, Any]) -> Tensor:
        """Pooled features `[B, hidden]` under what stands on the attention layers."""
        return mean_pool(self.encoder(**inputs).last_hidden_state, inputs.get("attention_mask"))

    def train(self: Attached, mode: bool = True) -> Attached:
        """Training mode for the prompts; the backbone stays in eval mode, but for layers that checkpoint."""
        super().train(mode)
        self.attention.freeze(training=mode)
        return self

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the base model's; each backward must come before the next forward."""
        self.base_model.gradient_checkpointing_enable(*args, **kwargs)
        self.train(self.training)

    def gradient_checkpointing_disable(self) -> None:
        """As the base model's."""
        self.base_model.gradient_checkpointing_disable()
        self.train(self.training)

    def detach(self) -> PreTrainedModel:
        """Take everything off the base model and give it back as it was; no task can be set from here on."""
        self.attention.detach()
        self._detached = True
        return self.base_model

    def check_attached(self) -> None:
        """Raise a `RuntimeError` after `detach`."""
        if self._detached:
            raise RuntimeError("the base model was given back by detach(); attach a new QTuningModel")
