"""Discovery of the attention layers that can take a prefix: one run of the model finds them or refuses the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qtuning_fast.integrations.transformers.interface import AttentionCall, watched
from qtuning_fast.integrations.transformers.offload import input_device
from qtuning_fast.method.prompts import LayerShape

_TOKENS = 5  # length of the dummy input
_DECODER_TOKENS = 3  # different, so that sizes distinguish cross-attention from self-attention
# The names of inputs that transformers' models share, and what they hold.
_KINDS = {
    "input_ids": "text",
    "pixel_values": "images",
    "pixel_values_videos": "videos",
    "input_features": "audio",
    "input_values": "audio",
}

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
            something that prefix attention cannot compute; the message names it. If the model consists of several
            models, the message names those that can be attached to instead.
    """
    try:
        return _layers_of(without_head(base_model))
    except NotImplementedError as error:
        parts = _parts_of(base_model)
        if not parts:
            raise
        raise NotImplementedError(_parts_message(base_model, parts)) from error


def _layers_of(model: PreTrainedModel) -> list[AttentionLayer]:
    two_stacks = model.config.is_encoder_decoder
    found = []
    for call in _calls_of(model):
        N, M = call.query.shape[2], call.key.shape[2]
        if N != M:  # cross-attention
            continue
        if two_stacks:
            stack = "decoder" if N == _DECODER_TOKENS else "encoder"
        else:
            stack = "decoder" if call.is_causal else "encoder"
        shape = LayerShape(call.query.shape[1], call.key.shape[1], call.query.shape[3], call.value.shape[3])
        found.append(AttentionLayer(call.module, shape, call.is_causal, stack))
    _check_all_call(model, found)
    return found


def _parts_of(base_model: PreTrainedModel) -> dict[str, PreTrainedModel | NotImplementedError]:
    """Return the models that a model consists of, by their path, or why they cannot take a prefix.

    They are the outermost ones that can be attached to. A model that is not composed of others has none.
    """
    parts: dict[str, PreTrainedModel | NotImplementedError] = {}
    for path, module in base_model.named_modules():
        if module in (base_model, without_head(base_model)) or not isinstance(module, PreTrainedModel):
            continue
        if any(path.startswith(f"{other}.") for other in parts):
            continue
        try:
            _layers_of(without_head(module))
            parts[path] = module
        except NotImplementedError as error:
            parts[path] = error
    reads = _reads(base_model)
    return parts if len(reads) > 1 or any(isinstance(part, PreTrainedModel) for part in parts.values()) else {}


def _parts_message(base_model: PreTrainedModel, parts: dict[str, PreTrainedModel | NotImplementedError]) -> str:
    fit = [
        f"base_model.{path} ({type(part).__name__}, reads {_listed(_reads(part))})"
        for path, part in parts.items()
        if isinstance(part, PreTrainedModel)
    ]
    refusals = "; ".join(f"base_model.{path}: {part}" for path, part in parts.items())
    advice = f"attach to one of them: {' or '.join(fit)}" if fit else f"none of them can take a prefix ({refusals})"
    return f"{type(base_model).__name__} reads {_listed(_reads(base_model))} and consists of several models; {advice}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def without_head(base_model: PreTrainedModel) -> PreTrainedModel:
    """Return the model below the head, or the model itself if it has no head."""
    body = base_model.base_model
    assert isinstance(body, PreTrainedModel)
    return body


def configs_of(model: nn.Module) -> list[Any]:
    """Return every config in the model that names an attention implementation, each once, the outermost first.

    Sub-models and, in some families, attention modules hold copies; every forward pass reads each of them.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in configs if c is not None and hasattr(c, "_attn_implementation")}.values())


def main_input(model: PreTrainedModel) -> str:
    """Return the name of a model's main input; the name that its class declares may be one that it does not take."""
    taken = inspect.signature(type(model).forward).parameters
    declared = model.main_input_name
    if declared in taken:
        return declared
    named = [name for name, each in taken.items() if each.kind is each.POSITIONAL_OR_KEYWORD and name != "self"]
    return next((name for name in named if name in _KINDS), named[0] if named else declared)


def _reads(model: PreTrainedModel) -> list[str]:
    """Return the kinds of input that a model takes, such as text and images."""
    taken = inspect.signature(type(model).forward).parameters
    return list(dict.fromkeys(kind for name, kind in _KINDS.items() if name in taken))


@torch.no_grad()
def _calls_of(model: PreTrainedModel) -> list[AttentionCall]:
    """Return the calls of the attention function in one forward pass in eval mode."""
    calls: list[AttentionCall] = []
    kind = type(model).__name__
    if model.config.model_type in _OWN_ATTENTION:
        raise NotImplementedError(f"{kind} cannot take a prefix: {_OWN_ATTENTION[model.config.model_type]}")
    inputs = dummy_inputs(model)
    try:
        with in_eval_mode(model), watched(model, calls.append):
            model(**inputs)
    except (NotImplementedError, ValueError) as error:
        raise NotImplementedError(f"{kind} cannot compute with prefix attention: {error}") from error
    except (TypeError, AttributeError) as error:  # what it says is of no help
        raise NotImplementedError(f"{kind} does not run on {' and '.join(inputs)} alone") from error
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
    name = main_input(model)
    if name == "pixel_values":
        size = getattr(model.config, "image_size", None)
        if not isinstance(size, (int, list, tuple)):
            raise NotImplementedError(f"{kind}: its config lacks image_size")
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, height, width, device=device, dtype=model.dtype)}
    if name != "input_ids":
        raise NotImplementedError(f"{kind} takes {name}; only text and image models are supported")
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
