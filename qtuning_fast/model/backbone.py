"""A frozen transformers model as a module whose attention layers take prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers import AttachedAttention, input_device
from qtuning_fast.method.pooling import first_token, last_token, mean_pool

_CLASS_TOKENS = {"cls_token", "class_embedding", "class_token"}  # what image models call theirs

Attached = TypeVar("Attached", bound="FrozenModel")


class FrozenModel(nn.Module):
    """What `QTuningModel` knows of its base model: frozen, in eval mode, and given back as it was.

    Args:
        base_model: see `QTuningModel`.
        placement: see `QTuningConfig`.

    Raises:
        TypeError, ValueError, NotImplementedError: the model cannot be attached to; the message says why.
    """

    base_model: PreTrainedModel
    accepts_loss_kwargs = False  # transformers.Trainer: forward's **kwargs go to the base model and are no loss options

    def __init__(self, base_model: PreTrainedModel, placement: str) -> None:
        super().__init__()
        self._given = (base_model,)  # in a tuple, since it may be a wrapper around what is registered below
        inner = _unwrapped(base_model)
        self.attention = AttachedAttention(inner, placement)
        self.base_model = inner
        self._detached = False
        if hasattr(inner, "hf_device_map"):  # tells transformers.Trainer not to move what stands on several devices
            self.hf_device_map = inner.hf_device_map

    @property
    def encoder(self) -> PreTrainedModel:
        """The stack that reads the input, without a head."""
        return self.attention.encoder

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return input_device(self.base_model)

    @property
    def hidden_size(self) -> int:
        """Length of a feature vector."""
        return self.encoder.config.hidden_size

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What `DistributedDataParallel` need not keep equal: the frozen backbone is, and may be sharded (FSDP2)."""
        frozen = [name for name, parameter in self.base_model.named_parameters() if not parameter.requires_grad]
        buffers = [name for name, _ in self.base_model.named_buffers()]
        return [f"base_model.{name}" for name in (*frozen, *buffers)]

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        everything, trainable = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
        print(f"trainable: {trainable:,} of {everything:,} parameters, {trainable / max(1, everything):.2%}")

    def encode(self, inputs: dict[str, Any]) -> Tensor:
        """Pooled features `[B, hidden]` of what was read, under what stands on the attention layers.

        The mean over the tokens; in a causal model the last token, in an image model the class token if it has one.

        Raises:
            NotImplementedError: an image model packs the images of a batch into one sequence.
        """
        encoder, causal = self.encoder, self.attention.is_causal
        output = encoder(**inputs, **({"use_cache": False} if causal else {}))
        hidden = output.last_hidden_state[:, self.attention.prompt_tokens :]
        image = encoder.main_input_name == "pixel_values"
        if image and len(hidden) != len(inputs["pixel_values"]):
            raise NotImplementedError(f"{type(encoder).__name__} packs a batch's images into one sequence")
        names = (name.split(".")[-1] for name, _ in encoder.named_parameters()) if image else ()
        pool = first_token if not _CLASS_TOKENS.isdisjoint(names) else last_token if causal else mean_pool
        return pool(hidden, inputs.get("attention_mask"))

    def train(self: Attached, mode: bool = True) -> Attached:
        """Training mode for the prompts; the backbone stays in eval mode, but for layers that checkpoint.

        So dropout within it is off, LoRA's included, also where LoRA's weights are trained beside the prompts.
        """
        super().train(mode)
        self.attention.freeze(training=mode)
        return self

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within the block in eval mode, in which no layer checkpoints, so that caches are used."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the base model's, with either kind of checkpoint."""
        self.base_model.gradient_checkpointing_enable(*args, **kwargs)
        self.train(self.training)

    def gradient_checkpointing_disable(self) -> None:
        """As the base model's."""
        self.base_model.gradient_checkpointing_disable()
        self.train(self.training)

    def _check_gradient(self, layers: Sequence[int]) -> None:
        """Raise a `RuntimeError` where none reaches prompts: heads would learn alone, and no one would notice."""
        passes = self.attention.passes_gradient(layers)
        self.train(self.training)
        if not passes:
            raise RuntimeError(
                f"no gradient reaches the prompts: layers of this {type(self.base_model).__name__} pass none, as those "
                "do that quantise activations too; quantise weights alone, or use finished tasks only"
            )

    def detach(self) -> PreTrainedModel:
        """Take everything off the base model and give it back as it was; no task can be set from here on."""
        self.attention.detach()
        self._detached = True
        return self._given[0]

    def _check_attached(self) -> None:
        """Raise a `RuntimeError` after `detach`."""
        if self._detached:
            raise RuntimeError("the base model was given back by detach(); attach a new QTuningModel")
        if hasattr(type(self), "unshard"):  # FSDP2 changes the class of what it shards
            raise RuntimeError(
                "fully_shard was called with the QTuningModel; call it with the base model before attaching, for the "
                "prompts change from task to task and stay whole"
            )


def _unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model within peft's wrapper, told without importing peft, or the model itself.

    Raises:
        ValueError: the wrapper holds prompts, which would be lost: they are no layers of the model within.
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model") or not hasattr(model, "peft_config"):
        return model
    for name, settings in model.peft_config.items():
        if settings.is_prompt_learning:
            raise ValueError(
                f"base_model is a PeftModel whose adapter {name!r} holds prompts ({settings.peft_type.value}); attach "
                "to its get_base_model() and convert the adapter by qtuning_fast.integrations.peft.adapter_from_peft"
            )
    return model.get_base_model()
