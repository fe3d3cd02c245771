"""Position ids as a model would give them itself, and a shift of them that makes room for a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers.attention import for_batch


def takes_positions(stack: PreTrainedModel) -> bool:
    """Whether the stack's forward takes `position_ids`; otherwise positions follow the sequence."""
    return "position_ids" in inspect.signature(stack.forward).parameters


def first_position(stack: PreTrainedModel) -> int:
    """The position id of the first token."""
    padding = _padding_position(stack)
    return 0 if padding is None else padding + 1


def free_positions(stack: PreTrainedModel) -> int | None:
    """How many tokens the stack has positions for; None where positions are no table that ends."""
    limit = getattr(stack.config, "max_position_embeddings", None)
    return None if limit is None or _position_table(stack) is None else limit - first_position(stack)


def check_room(stack: PreTrainedModel, tokens: int, taken: int) -> None:
    """Raise a ValueError where the stack has no positions for so many tokens beside those that a prompt takes."""
    limit = free_positions(stack)
    if limit is not None and tokens + taken > limit:
        raise ValueError(
            f"the input has {tokens} tokens and the prompt takes {taken} positions, but {type(stack).__name__} has "
            f"{limit} in all; use shorter inputs, or placement='prefix', which takes none"
        )


def _position_table(stack: PreTrainedModel) -> nn.Embedding | None:
    """The learned embedding of positions, where there is one."""
    for name, module in stack.named_modules():
        last = name.split(".")[-1]
        if isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last):
            return module
    return None


def _padding_position(stack: PreTrainedModel) -> int | None:
    """The position of padding where positions start behind it and count what is no padding, as in RoBERTa."""
    table = _position_table(stack)
    return None if table is None else table.padding_idx


def own_positions(stack: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """The `[1 or B, N]` position ids with which `stack(**inputs)` would compute."""
    given = inputs.get("position_ids")
    if given is not None:
        return given
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    assert tokens is not None
    padding, mask = _padding_position(stack), inputs.get("attention_mask")
    if padding is not None and ids is not None:
        seen = (ids != padding).long()
        return seen.cumsum(1) * seen + padding
    # OPT too leaves padding out, but by the mask, and its table starts two places late without saying so.
    if stack.config.model_type == "opt" and mask is not None and mask.ndim == 2:
        seen = mask.long()
        return (seen.cumsum(1) * seen - 1)[:, -tokens.shape[1] :]
    return torch.arange(tokens.shape[1], device=tokens.device)[None] + past_tokens(inputs) + first_position(stack)


def past_tokens(inputs: dict[str, Any]) -> int | Tensor:
    """How many tokens the cache among the inputs holds."""
    cache = inputs.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


class Shift(NamedTuple):
    """By how much position ids are larger: `[1 or B]`, and the largest of these as a number."""

    by: Tensor
    at_most: int


def shift_positions(stack: PreTrainedModel, placed: Callable[[], Shift | None]) -> RemovableHandle:
    """From here on the stack's position ids are larger by what `placed()` says, until the handle is removed."""

    def shifted(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        shift = placed()
        if shift is None:
            return None
        inputs, by = by_name(stack, args, kwargs), shift.by
        own = own_positions(stack, inputs)
        tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        past = past_tokens(inputs)
        if isinstance(past, int):  # a static cache counts on the device, where asking would wait for it
            check_room(stack, tokens.shape[1] + past, shift.at_most)
        each = by.to(own.device) if len(by) == 1 else for_batch(by.to(own.device), len(tokens))
        return (), inputs | {"position_ids": own + each[:, None]}

    return stack.register_forward_pre_hook(shifted, with_kwargs=True)


def by_name(stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `stack.forward` by name."""
    names = _signature(type(stack).forward)
    return dict(zip(names, args)) | kwargs


def _signature(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]
