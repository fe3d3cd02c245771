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

# Their positions start behind the padding token's and count the tokens that are not padding.
OFFSET_POSITIONS = (
    *("camembert", "data2vec-text", "longformer", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
)


def takes_positions(stack: PreTrainedModel) -> bool:
    """Whether the stack's forward takes `position_ids`; otherwise positions follow the sequence."""
    return "position_ids" in inspect.signature(stack.forward).parameters


def first_position(stack: PreTrainedModel) -> int:
    """The position id of the first token."""
    return stack.config.pad_token_id + 1 if stack.config.model_type in OFFSET_POSITIONS else 0


def check_room(stack: PreTrainedModel, tokens: int, taken: int) -> None:
    """Raise a ValueError where the stack has no positions for so many tokens beside those that a prompt takes."""
    limit = getattr(stack.config, "max_position_embeddings", None)
    if limit is None or not any(_is_position_table(name, module) for name, module in stack.named_modules()):
        return
    limit -= first_position(stack)
    if tokens + taken > limit:
        raise ValueError(
            f"the input has {tokens} tokens and the prompt takes {taken} positions, but {type(stack).__name__} has "
            f"{limit} in all; use shorter inputs, or placement='prefix', which takes none"
        )


def _is_position_table(name: str, module: nn.Module) -> bool:
    last = name.split(".")[-1]
    return isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last)


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
    if kind == "opt" and mask is not None and mask.ndim == 2:
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
