"""Padding moved behind the tokens, where a stack's answer would otherwise depend on the padding's place.

Learned positions that follow the sequence count padding in front, and padding between a prompt and the tokens changes
their distance, which relative positions and windows see. Bidirectional stacks only: their output has the new order, so
cross-attention takes a mask of that order, and features are pooled once the output is moved back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers.positions import argument_names, by_name

_BY_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "attention_mask")


def padding_behind(mask: Tensor) -> Tensor:
    """Return a padding mask `[B, N]` with its zeros last."""
    return _moved(mask, _places(mask))


def moved_back(states: Tensor, mask: Tensor) -> Tensor:
    """Return states `[B, N, hidden]` in the order of `padding_behind(mask)` in that of the mask."""
    places = _places(mask).to(states.device)
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[2]))


def move_padding_behind(model: PreTrainedModel, encoder: PreTrainedModel) -> list[RemovableHandle]:
    """Move padding of `model`'s `encoder` behind the tokens, until the handles are removed.

    The encoder's output then has the order of `padding_behind(mask)`; cross-attention takes it with that mask.
    """
    handles = [_changed(encoder, with_padding_behind)]
    if model.config.is_encoder_decoder:
        handles.append(_changed(model.get_decoder(), _with_memory_padding_behind))
    return handles


def _changed(stack: PreTrainedModel, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> RemovableHandle:
    """Apply `change` to the inputs of each call of a stack; None changes nothing."""
    names = argument_names(stack)

    def changed(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        inputs = change(by_name(names, args, kwargs))
        return None if inputs is None else ((), inputs)

    return stack.register_forward_pre_hook(changed, with_kwargs=True)


def with_padding_behind(inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return a stack's inputs with padding behind the tokens; None if they have no padding mask `[B, N]`."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return None
    places = _places(mask)
    there = {name: inputs[name] for name in _BY_TOKEN if inputs.get(name) is not None}
    return inputs | {name: _moved(x, places) for name, x in there.items()}


def _with_memory_padding_behind(inputs: dict[str, Any]) -> dict[str, Any] | None:
    mask = inputs.get("encoder_attention_mask")
    if mask is None or mask.ndim != 2:
        return None
    return inputs | {"encoder_attention_mask": padding_behind(mask)}


def _places(mask: Tensor) -> Tensor:
    """Return each token's new place, `[B, N]`: tokens keep their order, and so does padding."""
    seen = mask != 0
    tokens, padding = seen.long().cumsum(1), (~seen).long().cumsum(1)
    return torch.where(seen, tokens, tokens[:, -1:] + padding) - 1


def _moved(x: Tensor, places: Tensor) -> Tensor:
    """Move the tokens of `[1 or B, N, ...]` to their new places."""
    x, places = x.expand(places.shape[0], *x.shape[1:]), places.to(x.device)
    index = places.view(*places.shape, *[1] * (x.ndim - 2)).expand(x.shape)
    return torch.zeros_like(x).scatter(1, index, x)
