"""Which attention layers of a model can take a prefix: found by running it once, refused where one does not call us."""

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

_TOKENS = 5  # of the dummy input
_DECODER_TOKENS = 3  # another number, so that cross-attention is told from self-attention by its sizes

# Families known not to go through the interface, and why.
_DISENTANGLED = "its modelling code scores with disentangled relative positions, beside transformers' interface"
_OWN_ATTENTION = {
    "deberta": _DISENTANGLED,
    "deberta-v2": _DISENTANGLED,
    "falcon": "its modelling code computes attention itself, beside transformers' interface",
    "nllb-moe": "its experts leave tokens out by the values of the additive mask of eager attention",
}


@dataclass(frozen=True)
class AttentionLayer:
    """A self-attention module that calls the interface, its sizes, and the stack it stands in."""

    module: nn.Module
    shape: LayerShape
    is_causal: bool
    stack: str  # "encoder" or "decoder"; what a model with one stack is follows from its causality


def find_layers(base_model: PreTrainedModel) -> list[AttentionLayer]:
    """The self-attention layers of a model in the order in which they run, an encoder's before its decoder's.

    The model runs once on a dummy input, with its attention set to ours. Cross-attention is left out.

    Raises:
        NotImplementedError: a layer does not call the interface or shares its module with another, or the model needs
            what prefix attention cannot do; the message names it.
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
    """The model below the head; the model itself where it has none."""
    body = base_model.base_model
    assert isinstance(body, PreTrainedModel)
    return body


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Every config in the model that names an attention implementation, each once, the outermost first.

    Sub-models and, in some families, attention modules hold copies; each is read at every forward pass.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in configs if c is not None and hasattr(c, "_attn_implementation")}.values())


@torch.no_grad()
def _calls_of(model: PreTrainedModel) -> list[tuple[nn.Module, Tensor, Tensor, Tensor]]:
    """The calls of the attention function in one forward pass in eval mode."""
    calls: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []
    kind = type(model).__name__
    if model.config.model_type in _OWN_ATTENTION:
        raise NotImplementedError(f"{kind} cannot take a prefix: {_OWN_ATTENTION[model.config.model_type]}")
    inputs = dummy_inputs(model)
    try:
        with in_eval_mode(model), watched(model, lambda *call: calls.append(call)):
            model(**inputs)
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise NotImplementedError(f"{kind} does not compute by prefix attention: {error}") from error
    return calls


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """After the block each module is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A few tokens, or an image, as the model takes them."""
    kind, device = type(model).__name__, input_device(model)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", None)
        if not isinstance(size, (int, list, tuple)):
            raise NotImplementedError(f"{kind}: its config names no image_size")
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, height, width, device=device, dtype=model.dtype)}
    if model.main_input_name != "input_ids":
        raise NotImplementedError(f"{kind} takes {model.main_input_name}; text and image models can be attached to")
    # The token must not be padding: with nothing to see some models take other ways.
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
            raise NotImplementedError(f"{type(model).__name__}: its config names no num_hidden_layers")
        yield "model", count
        return
    for stack, part in (("encoder", model.get_encoder()), ("decoder", model.get_decoder())):
        yield stack, sum(isinstance(module, GradientCheckpointingLayer) for module in part.modules())
