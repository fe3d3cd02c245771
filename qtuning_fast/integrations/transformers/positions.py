"""A model's own position ids, and a shift of them that makes room for a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers.caches import cache_among
from qtuning_fast.integrations.transformers.interface import for_batch, watched
from qtuning_fast.integrations.transformers.layers import dummy_inputs


class Positions:
    """How a stack assigns positions to tokens, found once from its output and its modules, not from its name.

    Args:
        stack: stack that reads tokens, in eval mode, with its attention set to ours.

    Attributes:
        are_taken: whether it uses given `position_ids`; if not, positions follow the sequence.
        first: the position id of the first token.
        room: the number of tokens with a position; None without a learned table, which would bound it.
    """

    def __init__(self, stack: PreTrainedModel) -> None:
        table = _position_table(stack)
        # The padding's position, if positions start after it and skip padding, as in RoBERTa; otherwise None.
        self._padding = None if table is None else table.padding_idx
        self.first = first_position(stack)
        self.are_taken = _are_taken(stack, self.first)
        limit = getattr(stack.config, "max_position_embeddings", None)
        self.room = None if limit is None or table is None else limit - self.first
        # OPT also skips padding, but by the mask; its table has an undeclared offset of two.
        self._count_by_mask = stack.config.model_type == "opt"
        self._kind = type(stack).__name__

    def own(self, inputs: dict[str, Any]) -> Tensor:
        """Return the position ids `[1 or B, N]` that the stack would use for these inputs, given by name."""
        given = inputs.get("position_ids")
        if given is not None:
            return given
        ids, tokens, mask = inputs.get("input_ids"), tokens_of(inputs), inputs.get("attention_mask")
        if self._padding is not None and ids is not None:
            seen = (ids != self._padding).long()
            return seen.cumsum(1) * seen + self._padding
        if self._count_by_mask and mask is not None and mask.ndim == 2:
            seen = mask.long()
            return (seen.cumsum(1) * seen - 1)[:, -tokens.shape[1] :]
        return torch.arange(tokens.shape[1], device=tokens.device)[None] + past_tokens(inputs) + self.first

    def check_room(self, tokens: int, taken: int) -> None:
        """Raise a ValueError if there are too few positions for these tokens and those that a prompt takes."""
        if self.room is not None and tokens + taken > self.room:
            raise ValueError(
                f"the input has {tokens} tokens and the prompt takes {taken} positions, but {self._kind} has "
                f"{self.room} in all; use shorter inputs, or placement='prefix', which takes none"
            )


def first_position(model: PreTrainedModel) -> int:
    """Return the position id of an input's first token."""
    table = _position_table(model)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


@torch.no_grad()
def _are_taken(stack: PreTrainedModel, first: int) -> bool:
    """Return whether a stack uses `position_ids`: it compares attention's keys for two orders of them.

    A forward that names them may ignore them, and one that does not may pass them on.
    """
    if stack.main_input_name != "input_ids":
        return False
    ids = dummy_inputs(stack)["input_ids"]
    ascending = torch.arange(ids.shape[1], device=ids.device)[None] + first

    def keys(positions: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        with watched(stack, lambda module, query, key, value: found.append(key)):
            stack(input_ids=ids, position_ids=positions)
        return found

    try:
        pairs = list(zip(keys(ascending), keys(ascending.flip(1))))
    except TypeError:  # it has no argument of this name
        return False
    return any((mine - its).abs().max() > 2**-6 * its.abs().max() for mine, its in pairs)  # more than rounding


def _position_table(stack: PreTrainedModel) -> nn.Embedding | None:
    """Return the learned position embedding, or None."""
    for name, module in stack.named_modules():
        last = name.split(".")[-1]
        if isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last):
            return module
    return None


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """Return the input's token ids `[B, N]`, or the embeddings `[B, N, E]` given instead."""
    return inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]


def past_tokens(inputs: dict[str, Any]) -> int | Tensor:
    """Return the number of tokens in the cache among the inputs."""
    cache = cache_among(inputs)
    return 0 if cache is None else cache.get_seq_length()


class Shift(NamedTuple):
    """A shift of position ids, `[1 or B]`, and its maximum as a number."""

    by: Tensor
    at_most: int


def shift_positions(
    stack: PreTrainedModel, positions: Positions, placed: Callable[[], Shift | None]
) -> RemovableHandle:
    """Add `placed()` to the stack's position ids until the handle is removed."""
    names = argument_names(stack)

    def shifted(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        shift = placed()
        if shift is None:
            return None
        inputs = by_name(names, args, kwargs)
        own, tokens, past = positions.own(inputs), tokens_of(inputs), past_tokens(inputs)
        if isinstance(past, int):  # a static cache counts on the device, and reading that would wait for it
            positions.check_room(tokens.shape[1] + past, shift.at_most)
        by = shift.by.to(own.device)
        each = by if by.shape[0] == 1 else for_batch(by, tokens.shape[0])
        return (), inputs | {"position_ids": own + each[:, None]}

    return stack.register_forward_pre_hook(shifted, with_kwargs=True)


def argument_names(stack: PreTrainedModel) -> tuple[str, ...]:
    """Return the argument names of the stack's class's forward; they only serve to read a call's arguments."""
    return tuple(inspect.signature(type(stack).forward).parameters)[1:]


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    return dict(zip(names, args)) | kwargs
