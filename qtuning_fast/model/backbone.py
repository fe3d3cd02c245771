"""The frozen base model of a `QTuningModel`: prefixes are injected into it, and it is given back as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers import PrefixInjector, input_device
from qtuning_fast.method.pooling import first_token, last_token, mean_pool
from qtuning_fast.model.fingerprint import fingerprint

_CLASS_TOKENS = {"cls_token", "class_embedding", "class_token"}  # what image models call theirs


class Backbone:
    """A frozen transformers model, in eval mode, whose attention layers take prefixes.

    Args:
        base_model: see `QTuningModel`.
        placement: see `QTuningConfig`.

    Attributes:
        model: the transformers model, without a wrapper of peft's around it.
        injector: places prefixes on its attention layers.

    Raises:
        TypeError, ValueError, NotImplementedError: the model cannot take prefixes; the message says why.
    """

    def __init__(self, base_model: PreTrainedModel, placement: str) -> None:
        self._given = base_model
        self.model = _unwrapped(base_model)
        self.injector = PrefixInjector(self.model, placement)
        self._is_detached = False

    @property
    def encoder(self) -> PreTrainedModel:
        """The stack that reads the input, without a head."""
        return self.injector.encoder

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def hidden_size(self) -> int:
        """Length of a feature vector."""
        return self.encoder.config.hidden_size

    @property
    def vocabulary(self) -> nn.Embedding | None:
        """The embedding of words, where the model reads words."""
        words = self.encoder.get_input_embeddings()
        return words if isinstance(words, nn.Embedding) else None

    @property
    def embedding_size(self) -> int:
        """Length of one embedding in front of the input."""
        return self.hidden_size if self.vocabulary is None else self.vocabulary.embedding_dim

    @property
    def fingerprint(self) -> str:
        """What tells this base model from others (`qtuning_fast.model.fingerprint`)."""
        return fingerprint(self.injector.model)

    # Computing, under the prefix that stands on the layers

    def check_inputs(self, inputs: dict[str, Any], *, under_a_task: bool) -> None:
        """Raise a ValueError where inputs ask for what attention with a prefix cannot give."""
        if inputs.get("output_attentions"):
            raise ValueError("output_attentions=True: attention weights are never formed; use the model after detach()")
        if not under_a_task:
            return
        if inputs.get("return_dict") is False:
            raise ValueError("return_dict=False: under a task the output has names")
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; under a task it must be [B, N]")

    def encode(self, inputs: dict[str, Any]) -> Tensor:
        """Pooled features `[B, hidden]` of what was read.

        The mean over the tokens; in a causal model the last token, in an image model the class token if it has one.

        Raises:
            NotImplementedError: an image model packs the images of a batch into one sequence.
        """
        encoder, causal = self.encoder, self.injector.is_causal
        output = encoder(**inputs, **({"use_cache": False} if causal else {}))
        hidden = output.last_hidden_state[:, self.injector.prompt_tokens :]
        image = encoder.main_input_name == "pixel_values"
        if image and len(hidden) != len(inputs["pixel_values"]):
            raise NotImplementedError(f"{type(encoder).__name__} packs a batch's images into one sequence")
        names = (name.split(".")[-1] for name, _ in encoder.named_parameters()) if image else ()
        pool = first_token if not _CLASS_TOKENS.isdisjoint(names) else last_token if causal else mean_pool
        return pool(hidden, inputs.get("attention_mask"))

    def read(self, inputs: dict[str, Any]) -> Tensor:
        """`encode`, of the inputs that the stack takes that reads them."""
        return self.encode({k: v for k, v in inputs.items() if not k.startswith(("decoder_", "logits_to_keep"))})

    def compute(self, inputs: dict[str, Any], labels: Tensor | None) -> Any:
        """What the base model itself makes of the inputs, by its own head."""
        return self.model(**inputs, **({} if labels is None else {"labels": labels}))

    def compute_under_a_task(self, inputs: dict[str, Any], labels: Tensor | None) -> Any:
        """The same, but for a cache where layers checkpoint: they compute twice, and would write into it twice."""
        return self.compute(({"use_cache": False} if self.injector.checkpoints else {}) | inputs, labels)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`."""
        generate: Callable[..., Any] = self.model.generate  # type: ignore[assignment]
        return generate(*args, **kwargs)

    def check_generates(self) -> None:
        """Raise a ValueError where the base model cannot generate."""
        if not self.model.can_generate():
            raise ValueError(f"{type(self.model).__name__} has no language modelling head and cannot generate")

    # Frozen, and given back

    def freeze(self, *, training: bool) -> None:
        """Eval mode; while prompts train, layers that checkpoint their activations excepted."""
        self.injector.freeze(training=training)

    def check_gradient(self, layers: Sequence[int]) -> None:
        """Raise a `RuntimeError` where none reaches prompts: heads would learn alone, and no one would notice."""
        if not self.injector.passes_gradient(layers):
            raise RuntimeError(
                f"no gradient reaches the prompts: layers of this {type(self.model).__name__} pass none, as those "
                "do that quantise activations too; quantise weights alone, or use finished tasks only"
            )

    def check_attached(self) -> None:
        """Raise a `RuntimeError` after `detach`."""
        if self._is_detached:
            raise RuntimeError("the base model was given back by detach(); attach a new QTuningModel")

    def detach(self) -> PreTrainedModel:
        """Take everything off the base model and give it back as it was, wrapper and all."""
        self.injector.detach()
        self._is_detached = True
        return self._given


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
