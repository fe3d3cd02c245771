"""The frozen base model of a `QTuningModel`: it takes prefixes and can be restored to its original state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers import PrefixInjector, input_device
from qtuning_fast.integrations.transformers.packing import are_packed, check_position_ids
from qtuning_fast.integrations.transformers.padding import with_padding_behind
from qtuning_fast.method.labels import IGNORED, checked_tokens, token_loss
from qtuning_fast.method.pooling import first_token, last_token, mean_pool
from qtuning_fast.model.fingerprint import fingerprint

HiddenStates = tuple[Tensor, ...] | None

_CLASS_TOKENS = {"cls_token", "class_embedding", "class_token"}  # its names in image models


class Backbone:
    """A frozen transformers model, in eval mode, whose attention layers take prefixes.

    Args:
        base_model: see `QTuningModel`.
        placement: see `QTuningConfig`.

    Attributes:
        model: the transformers model, without peft's wrapper.
        injector: places prefixes on its attention layers.

    Raises:
        TypeError, ValueError, NotImplementedError: the model cannot take prefixes; the message says why.
    """

    def __init__(self, base_model: PreTrainedModel, placement: str) -> None:
        self._given = base_model
        self.model = _unwrapped(base_model)
        self.injector = PrefixInjector(self.model, placement)
        self._is_detached = False
        names = (name.split(".")[-1] for name, _ in self.encoder.named_parameters())
        # Found now, because a compiler that traces the search may take what it found in another model.
        self._has_class_token = self.injector.reads_images and not _CLASS_TOKENS.isdisjoint(names)

    @property
    def encoder(self) -> PreTrainedModel:
        """The stack that reads the input, without a head."""
        return self.injector.encoder

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def hidden_size(self) -> int:
        """The length of a feature vector."""
        return self.encoder.config.hidden_size

    @property
    def vocabulary(self) -> nn.Embedding | None:
        """The word embedding, or None if the model reads no text."""
        words = self.encoder.get_input_embeddings()
        return words if isinstance(words, nn.Embedding) else None

    @property
    def embedding_size(self) -> int:
        """The length of an embedding in front of the input."""
        return self.hidden_size if self.vocabulary is None else self.vocabulary.embedding_dim

    @property
    def fingerprint(self) -> str:
        """Return the hash that identifies this base model (`qtuning_fast.model.fingerprint`)."""
        return fingerprint(self.injector.model)

    # Computing under the placed prefix

    def check_inputs(self, inputs: dict[str, Any], *, under_a_task: bool) -> None:
        """Raise a ValueError if attention with a prefix cannot compute what the inputs request."""
        if inputs.get("output_attentions"):
            raise ValueError("output_attentions=True: attention weights are never formed; use the model after detach()")
        if not under_a_task:
            return
        if inputs.get("return_dict") is False:
            raise ValueError("return_dict=False: with a task set, the output is always a dict; leave it out")
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; with a task set, it must be [B, N]")
        check_position_ids(inputs, taken=self.injector.positions.are_taken, kind=type(self.model).__name__)

    def encode(self, inputs: dict[str, Any], pad_token_id: int | None = None) -> Tensor:
        """Return pooled features `[B, hidden]`; see `encode_with_states`."""
        return self.encode_with_states(inputs, pad_token_id)[0]

    def encode_with_states(self, inputs: dict[str, Any], pad_token_id: int | None) -> tuple[Tensor, HiddenStates]:
        """Return pooled features `[B, hidden]` of the inputs, and all hidden states if they are requested.

        The features are the mean over the tokens; in a causal model the last token, in an image model the class token,
        if any.

        Args:
            inputs: those of the encoder.
            pad_token_id: the token that pads a causal model's inputs without a mask, as in transformers.

        Raises:
            ValueError: rows hold several sequences, as their position ids say.
            NotImplementedError: an image model packs the images of a batch into one sequence.
        """
        if are_packed(inputs):
            raise ValueError(
                "position_ids start again within a row, as in packed rows, which hold several sequences; a row has one "
                "feature vector and one label, so give one sequence a row"
            )
        encoder, injector, mask = self.encoder, self.injector, inputs.get("attention_mask")
        output = encoder(**{**inputs, **({"use_cache": False} if injector.is_causal else {})})
        last, states = injector.states_of_input(output.last_hidden_state, mask), output.get("hidden_states")
        if injector.reads_images and last.shape[0] != inputs["pixel_values"].shape[0]:
            raise NotImplementedError(f"{type(encoder).__name__} packs the images of a batch into one sequence")
        if states is not None:
            states = tuple(injector.states_of_input(each, mask) for each in states)
        return self._pooled(last, inputs, pad_token_id), states

    def _pooled(self, last: Tensor, inputs: dict[str, Any], pad_token_id: int | None) -> Tensor:
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        if self._has_class_token:
            return first_token(last, mask)
        if not self.injector.is_causal:
            return mean_pool(last, mask)
        if mask is None and ids is not None and pad_token_id is not None:
            mask = ids != pad_token_id
        return last_token(last, mask)

    def read(self, inputs: dict[str, Any], pad_token_id: int | None = None) -> Tensor:
        """Return the features of the inputs without those of a decoder and of a head, wherever padding is.

        The base model alone may count padding as positions, so it is moved behind the tokens.
        """
        theirs = {k: v for k, v in inputs.items() if not k.startswith(("decoder_", "logits_to_keep"))}
        return self.encode(with_padding_behind(theirs) or theirs, pad_token_id)

    def compute(self, inputs: dict[str, Any], labels: Tensor | None) -> Any:
        """Return the base model's own output, from its own head."""
        return self.model(**inputs, **({} if labels is None else {"labels": labels}))

    def compute_under_a_task(
        self, inputs: dict[str, Any], labels: Tensor | None, num_items: Tensor | int | None = None
    ) -> Any:
        """Return the base model's own output under a task, with a loss that does not depend on padding.

        There is no cache if layers checkpoint: they compute twice and would write to it twice.

        Args:
            inputs: those of the base model.
            labels: `[B, N]` token ids, or -100.
            num_items: see `qtuning_fast.method.labels.label_loss`.

        Raises:
            TypeError, ValueError: the labels are invalid.
        """
        inputs = ({"use_cache": False} if self.injector.checkpoints else {}) | inputs
        if labels is None:
            return self.compute(inputs, None)
        labels = self.checked_labels(labels, inputs)
        output = self.compute(inputs, labels)
        output["loss"] = token_loss(output.loss, self.counted(labels), num_items)
        return output

    def checked_labels(self, labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the token labels as int64, in a decoder without those that padding in front would predict."""
        tokens, mask = inputs.get("inputs_embeds", inputs.get("input_ids")), inputs.get("attention_mask")
        shape = (None, None) if tokens is None or self.model.config.is_encoder_decoder else tokens.shape[:2]
        labels = checked_tokens(labels, getattr(self.model.get_output_embeddings(), "out_features", None), shape)
        if mask is None or not self.injector.is_causal or mask.shape != labels.shape:
            return labels
        predicted_by_padding = F.pad((mask[:, 1:] != 0) & (mask[:, :-1] == 0), (1, 0))
        return labels.masked_fill(predicted_by_padding.to(labels.device), IGNORED)

    def counted(self, labels: Tensor) -> Tensor:
        """Return whether each token label counts in the loss; a decoder predicts no first token."""
        return (labels if self.model.config.is_encoder_decoder else labels[:, 1:]).long() != IGNORED

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model's `generate`."""
        generate: Callable[..., Any] = self.model.generate  # type: ignore[assignment]
        return generate(*args, **kwargs)

    def read_by_generate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of a call of `generate`, with the padding mask that it makes if it is given none."""
        inputs = dict(kwargs)
        if args or "inputs" in inputs:  # what generate calls the input, whatever the model calls it
            inputs[self.model.main_input_name] = args[0] if args else inputs.pop("inputs")
        ids, defaults = inputs.get("input_ids"), self.model.generation_config
        pad, end = (kwargs.get(name, getattr(defaults, name, None)) for name in ("pad_token_id", "eos_token_id"))
        ends = end if isinstance(end, list) else [end]
        if ids is not None and inputs.get("attention_mask") is None and pad is not None and pad not in ends:
            inputs["attention_mask"] = (ids != pad).long()
        return inputs

    def check_generates(self) -> None:
        """Raise a ValueError if the base model cannot generate."""
        if not self.model.can_generate():
            raise ValueError(f"{type(self.model).__name__} has no language modelling head and cannot generate")

    # Freezing and restoring

    def freeze(self, *, training: bool) -> None:
        """Set eval mode, except, while prompts train, for layers that checkpoint their activations."""
        self.injector.freeze(training=training)
        words = self.vocabulary
        if words is not None and hasattr(words, "neftune_noise_alpha"):  # NEFTune adds its noise in training mode only
            words.training = training

    def check_gradient(self, layers: Sequence[int]) -> None:
        """Raise a `RuntimeError` if no gradient reaches the prompts, where only heads would learn, unnoticed."""
        if not self.injector.passes_gradient(layers):
            raise RuntimeError(
                f"no gradient reaches the prompts: layers of this {type(self.model).__name__} pass none, as is usual "
                "if activations are quantised too; quantise weights alone, or use finished tasks only"
            )

    def check_attached(self) -> None:
        """Raise a `RuntimeError` after `detach`."""
        if self._is_detached:
            raise RuntimeError("the base model was detached by detach(); attach a new QTuningModel")

    def detach(self) -> PreTrainedModel:
        """Restore the base model to its original state and return it, in its wrapper if it had one."""
        self.injector.detach()
        self._is_detached = True
        return self._given


def _unwrapped(model: Any) -> PreTrainedModel:
    """Return the transformers model within peft's wrapper, found without importing peft, or the model itself.

    Raises:
        ValueError: the wrapper holds prompts, which would be lost because they are not layers of the inner model.
    """
    if isinstance(model, PreTrainedModel) or not hasattr(model, "get_base_model") or not hasattr(model, "peft_config"):
        return model
    for name, settings in model.peft_config.items():
        if settings.is_prompt_learning:
            raise ValueError(
                f"base_model is a PeftModel whose adapter {name!r} holds prompts ({settings.peft_type.value}); attach "
                "to its get_base_model() and convert the adapter with qtuning_fast.integrations.peft.adapter_from_peft"
            )
    return model.get_base_model()
