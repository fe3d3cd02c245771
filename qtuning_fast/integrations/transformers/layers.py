"""Discovery of the attention layers that can take a prefix: one run of the model finds them or refuses the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qtuning_fast.integrations.transformers.interface import watched
from qtuning_fast.integrations.transformers.offload import input_device
from qtuning_fast.method.prompts import LayerShape

_TOKENS = 5  # length of the dummy input
_DECODER_TOKENS = 3  # different, so that sizes distinguish cross-attention from self-attention

# Families known to bypass the interface, and why.
_DISENTANGLED = "its modelling code scores with disentangled relative positions, bypassing transformers' interface"
_OWN_ATTENTION = {
    "deberta": _DISENTANGLED,
    "deberta-v2": _DISENTANGLED,
    "falcon": "its modelling code computes attention itself, bypassing transformers' interface",
    "nllb-moe": "its experts skip tokens by the values of the additive mask of eager attention",
}


@dataclass(frozen=True)
class AttentionLayer:
    """A self-attention module that calls the interface, its sizes, and its stack."""

    module: nn.Module
    shape: LayerShape
    is_causal: bool
    stack: str  # "encoder" or "decoder"; causality decides it in a model with one stack


def find_layers(base_model: PreTrainedModel) -> list[AttentionLayer]:
    """Return a model's self-attention layers in the order in which they run, an encoder's before its decoder's.

    The model runs once on a dummy input, with its attention set to ours. Cross-attention is left out.

    Raises:
        NotImplementedError: a layer does not call the interface or shares its module with another, or the model needs
            something that prefix attention cannot compute; the message names it.
    """
    model = without_head(base_model)
    calls = _calls_of(model)
    two_stacks = model.config.is_encoder_decoder
    found = []
    for module, query, key, value in calls:
        N, M = query.shape[2], key.shape[2]
        if N != M:  # cross-attention
            continue
        causal = bool(getattr(module, "is_causal", False))
        stack = ("decoder" if N == _DECODER_TOKENS else "encoder") if two_stacks else "decoder" if causal else "encoder"
        shape = LayerShape(query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        found.append(AttentionLayer(module, shape, causal, stack))
    _check_all_call(model, found)
    return found


def without_head(base_model: PreTrainedModel) -> PreTrainedModel:
    """Return the model below the head, or the model itself if it has no head."""
    body = base_model.base_model
    assert isinstance(body, PreTrainedModel)
    return body


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Return every config in the model that names an attention implementation, each once, the outermost first.

    Sub-models and, in some families, attention modules hold copies; every forward pass reads each of them.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in configs if c is not None and hasattr(c, "_attn_implementation")}.values())


@torch.no_grad()
def _calls_of(model: PreTrainedModel) -> list[tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """Return the calls of the attention function in one forward pass in eval mode."""
    calls: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []
    kind = type(model).__name__
    if model.config.model_type in _OWN_ATTENTION:
        raise NotImplementedError(f"{kind} cannot take a prefix: {_OWN_ATTENTION[model.config.model_type]}")
    inputs = dummy_inputs(model)
    try:
        with in_eval_mode(model), watched(model, lambda *call: calls.append(call[:4])):
            model(**inputs)
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise NotImplementedError(f"{kind} cannot compute with prefix attention: {error}") from error
    return calls


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Set eval mode within the block and restore each module's mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return inputs for the model: a few tokens, or an image."""
    kind, device = type(model).__name__, input_device(model)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", None)
        if not isinstance(size, (int, list, tuple)):
            raise NotImplementedError(f"{kind}: its config lacks image_size")
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, height, width, device=device, dtype=model.dtype)}
    if model.main_input_name != "input_ids":
        raise NotImplementedError(f"{kind} takes {model.main_input_name}; only text and image models are supported")
    # The token must not be padding: some models take another path if every token is masked.
    not_these = [getattr(model.config, name, None) for name in ("pad_token_id", "eos_token_id")]
    token = next(i for i in range(3) if i not in not_these)
    inputs = {"input_ids": torch.full((1, _TOKENS), token, device=device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.full((1, _DECODER_TOKENS), token, device=device)
    return inputs


def _check_all_call(model: PreTrainedModel, found: list[AttentionLayer]) -> None:
    kind = type(model).__name__
    for stack, expected in _layer_counts(model):
        modules = [id(layer.module) for layer in found if layer.stack == stack or stack == "model"]
        if len(modules) != expected:
            raise NotImplementedError(
                f"{kind}: {len(modules)} of the {expected} layers of its {stack} call transformers' attention "
                "interface; all of them must, or the prefix would silently be left out"
            )
        if len(set(modules)) < expected:
            raise NotImplementedError(
                f"{kind}: its layers share one attention module, so they cannot have prefixes of their own"
            )


def _layer_counts(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    if not model.config.is_encoder_decoder:
        count = getattr(model.config, "num_hidden_layers", None)
        if count is None:
            raise NotImplementedError(f"{type(model).__name__}: its config lacks num_hidden_layers")
        yield "model", count
        return
    for stack, part in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        yield stack, sum(isinstance(module, GradientCheckpointingLayer) for module in part.modules())
