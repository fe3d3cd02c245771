"""Position ids as a model would give them itself, and a shift of them that makes room for a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers.attention import for_batch

# Their positions start behind the padding token's and count the tokens that are not padding.
OFFSET_POSITIONS = ("camembert", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl")


def takes_positions(stack: PreTrainedModel) -> bool:
    """Whether the stack's forward takes `position_ids`; otherwise positions follow the sequence."""
    return "position_ids" in inspect.signature(stack.forward).parameters


def first_position(stack: PreTrainedModel) -> int:
    """The position id of the first token."""
    return stack.config.pad_token_id + 1 if stack.config.model_type in OFFSET_POSITIONS else 0


def own_positions(stack: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The `[1 or B, N]` position ids with which `stack(**inputs)` would compute."""
    given = inputs.get("position_ids")
    if given is not None:
        return given
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    assert tokens is not None
    kind, mask = stack.config.model_type, inputs.get("attention_mask")
    if kind in OFFSET_POSITIONS and ids is not None:
        seen = (ids != stack.config.pad_token_id).long()
        return seen.cumsum(1) * seen + stack.config.pad_token_id
    cache = inputs.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    if kind == "opt" and mask is not None and mask.ndim == 2:
        seen = mask.long()
        return (seen.cumsum(1) * seen - 1)[:, -tokens.shape[1] :]
    return torch.arange(tokens.shape[1], device=tokens.device)[None] + past + first_position(stack)


def shift_positions(stack: PreTrainedModel, shift: Callable[[], Tensor | None]) -> RemovableHandle:
    """From here on the stack's position ids are larger by `shift()`, `[1 or B]`, until the handle is removed."""

    def shifted(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        by = shift()
        if by is None:
            return None
        inputs = by_name(stack, args, kwargs)
        own = own_positions(stack, inputs)
        tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        each = by.to(own.device) if len(by) == 1 else for_batch(by.to(own.device), len(tokens))
        return (), inputs | {"position_ids": own + each[:, None]}

    return stack.register_forward_pre_hook(shifted, with_kwargs=True)


def by_name(stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `stack.forward` by name."""
    names = _signature(type(stack).forward)
    return dict(zip(names, args)) | kwargs


def _signature(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]
