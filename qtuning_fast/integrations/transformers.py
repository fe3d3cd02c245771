"""Prefix attention inside transformers models, through the attention and mask interfaces; no forward is patched.

Importing this module registers `attn_implementation="qtuning_fast"`. A model loaded with it computes its attention by
`prefix_attention`, without a prefix until one is placed on its attention layers (`AttachedAttention`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

from qtuning_fast.functional import prefix_attention
from qtuning_fast.nn.prefix import LayerShape

NAME = "qtuning_fast"

# A plain attribute on each attention module holds its prefix: keyword arguments of prefix_attention. It stays in place
# after a forward pass, so that gradient checkpointing recomputes what was computed.
_PREFIX = "qtuning_prefix"

_ATTACHED = "qtuning_attached"  # on a base model that is attached to

_REFUSED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class AttentionLayer:
    """An attention module that calls the interface, and its sizes."""

    module: nn.Module
    shape: LayerShape
    is_causal: bool


_found: ContextVar[list[AttentionLayer] | None] = ContextVar("found", default=None)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query `[B, Hq, N, D]` to output `[B, N, Hq, Dv]`, and no weights.

    Raises:
        ValueError: attention dropout or attention weights are asked for.
        NotImplementedError: soft-capping, attention sinks or a relative position bias.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: fused attention never forms the weights; use attn_implementation='eager'"
        )
    if dropout:
        raise ValueError(f"dropout is {dropout}: prefix attention has no dropout; put the model in eval mode")
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name}: {type(module).__name__} asks for it and prefix attention does not do it yet"
            )
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    found = _found.get()
    if found is not None:
        shape = LayerShape(query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        found.append(AttentionLayer(module, shape, causal))
    prefix: Mapping[str, Any] = getattr(module, _PREFIX, None) or _no_prefix(key, value)
    output = prefix_attention(
        query,
        key,
        value,
        **prefix,
        attn_mask=attention_mask,
        is_causal=causal and attention_mask is None and query.shape[2] > 1,  # an explicit mask holds causality already
        scale=scaling,
    )
    assert isinstance(output, Tensor)
    return output.transpose(1, 2), None


def _no_prefix(key: Tensor, value: Tensor) -> dict[str, Any]:
    heads = key.shape[1]
    return {
        "prefix_key": key.new_empty(heads, 0, key.shape[3]),
        "prefix_value": value.new_empty(heads, 0, value.shape[3]),
        "gate": None,
    }


def attention_mask(*, mask_function: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """transformers' mask function: `[B, M]` where padding is all there is, else an explicit `[B, 1, N, M]`, both bool.

    Causality goes into the explicit mask, since with a static cache `M` is the cache's capacity and not the number of
    keys written so far.
    """
    if mask_function is bidirectional_mask_function and not kwargs.get("use_vmap"):
        return None if attention_mask is None else attention_mask.bool()
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)


class AttachedAttention:
    """The attention layers of one frozen model, and the switch between their own attention and ours.

    Args:
        base_model: a transformers model in which every layer calls the attention interface.

    Attributes:
        layers: its attention layers, in the order in which they run.

    Raises:
        TypeError: `base_model` is not a transformers model.
        ValueError: a layer does not call the interface, or the model is attached to already.
        NotImplementedError: the model is of a kind that is not supported yet.
    """

    def __init__(self, base_model: PreTrainedModel) -> None:
        if not isinstance(base_model, PreTrainedModel):
            raise TypeError(f"base_model is a {type(base_model).__name__}; it must be a transformers PreTrainedModel")
        if hasattr(base_model, _ATTACHED):
            raise ValueError("base_model has a QTuningModel attached already; call its detach() first")
        self._base_model = base_model
        self._original: list[tuple[Any, str]] = []  # while ours is on: what each config named before
        self.switch()
        try:
            self.layers = _find_layers(encoder_of(base_model))
        finally:
            self.restore()
        setattr(base_model, _ATTACHED, True)
        self._required_grad = [(parameter, parameter.requires_grad) for parameter in base_model.parameters()]
        self._was_training = [(module, module.training) for module in base_model.modules()]
        base_model.requires_grad_(False)
        self.freeze(training=False)

    def switch(self) -> None:
        """Attention by `prefix_attention` from here on."""
        if not self._original:
            self._original = [(config, config._attn_implementation) for config in _configs(self._base_model)]
        for config, _ in self._original:
            config._attn_implementation = NAME

    def restore(self) -> None:
        """The original attention and mask functions from here on, and no prefix anywhere."""
        for config, implementation in self._original:
            config._attn_implementation = implementation
        self._original = []
        for layer in getattr(self, "layers", []):
            layer.module.__dict__.pop(_PREFIX, None)

    def freeze(self, *, training: bool) -> None:
        """The base model in eval mode; while prompts train, its layers that checkpoint their activations excepted."""
        self._base_model.eval()
        for module in self._base_model.modules():
            if isinstance(module, GradientCheckpointingLayer):  # which it does in training mode only
                module.training = training and module.gradient_checkpointing

    def detach(self) -> None:
        """The base model as it was; another may be attached from here on."""
        self.restore()
        self._base_model.__dict__.pop(_ATTACHED, None)
        for parameter, required in self._required_grad:
            parameter.requires_grad_(required)
        for module, training in self._was_training:
            module.training = training

    def place(self, layers: Sequence[int], prefixes: Sequence[Mapping[str, Any]]) -> None:
        """Give the layers with these indices their prefixes (keyword arguments of `prefix_attention`)."""
        for index, prefix in zip(layers, prefixes):
            setattr(self.layers[index].module, _PREFIX, prefix)


def encoder_of(base_model: PreTrainedModel) -> PreTrainedModel:
    """The base model, or its encoder where it has a head."""
    return cast(PreTrainedModel, base_model.base_model)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config in the model that names an attention implementation, the outermost first."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return list(configs.values())


@torch.no_grad()
def _find_layers(encoder: PreTrainedModel) -> list[AttentionLayer]:
    """The layers that call the attention function, found by running the model once on a dummy input."""
    kind = type(encoder).__name__
    if encoder.config.is_encoder_decoder or encoder.main_input_name != "input_ids":
        raise NotImplementedError(f"{kind}: only text encoders of the BERT family can be attached to so far")
    modes = [(module, module.training) for module in encoder.modules()]
    found: list[AttentionLayer] = []
    token = _found.set(found)
    try:
        encoder.eval()
        encoder(input_ids=torch.zeros(1, 4, dtype=torch.long, device=encoder.device))
    finally:
        _found.reset(token)
        for module, training in modes:
            module.training = training
    expected = encoder.config.num_hidden_layers
    if len(found) != expected:
        raise ValueError(
            f"{kind}: {len(found)} of its {expected} layers call transformers' attention interface; "
            "all of them must, or the prefix would silently be left out"
        )
    if len({id(layer.module) for layer in found}) < expected:
        raise NotImplementedError(
            f"{kind}: its layers share one attention module, so they cannot have prefixes of their own"
        )
    if any(layer.is_causal for layer in found):
        raise NotImplementedError(f"{kind} is causal: only text encoders of the BERT family can be attached to so far")
    return found
