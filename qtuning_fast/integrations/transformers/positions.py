"""Position ids that do not depend on padding, and a shift of them that makes room for a prompt."""

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
from qtuning_fast.integrations.transformers.layers import dummy_inputs, main_input
from qtuning_fast.integrations.transformers.masks import has_window, padding_beside
from qtuning_fast.integrations.transformers.packing import keeps_packed_rows_apart, without_cache


class Positions:
    """How a stack assigns positions to tokens, found once from its output and its modules, not from its name.

    Args:
        stack: stack that reads tokens, in eval mode, with its attention set to ours.

    Attributes:
        are_taken: whether it uses given `position_ids`; if not, positions follow the sequence.
        first: the position id of the first token.
        keeps_packed_rows_apart: whether tokens do not see other sequences of their row if position ids start again.
        follow_the_sequence: whether a learned position is a token's place in the sequence, padding included.
        room: the number of tokens with a position; None without a learned table, which would bound it.
    """

    def __init__(self, stack: PreTrainedModel) -> None:
        table = _position_table(stack)
        # The padding's position, if positions start after it and skip padding, as in RoBERTa; otherwise None.
        self._padding = None if table is None else table.padding_idx
        self.first = first_position(stack)
        self.are_taken = _are_taken(stack, self.first)
        self.keeps_packed_rows_apart = self.are_taken and keeps_packed_rows_apart(stack, self.first)
        self.follow_the_sequence = table is not None and not self.are_taken
        limit = getattr(stack.config, "max_position_embeddings", None)
        self.room = None if limit is None or table is None else limit - self.first
        self._kind = type(stack).__name__

    def own(self, inputs: dict[str, Any]) -> Tensor:
        """Return the given position ids, or else those `[1 or B, N]` that do not depend on padding.

        Without padding they are the stack's own. Padding takes no position, on either side; the positions of padding
        itself are of no consequence.
        """
        given = inputs.get("position_ids")
        if given is not None:
            return given
        ids, mask, past = inputs.get("input_ids"), padding_mask(inputs), past_tokens(inputs)
        N, device = tokens_of(inputs).shape[1], tokens_of(inputs).device
        if mask is None:
            if self._padding is None or ids is None:
                return torch.arange(N, device=device)[None] + past + self.first
            return _count(ids != self._padding) + past + self.first
        seen = mask.to(device) != 0
        if self._padding is not None and ids is not None and ids.shape == mask.shape:
            seen = seen & (ids != self._padding)
        counted = _count(seen) + self.first
        if isinstance(past, int):
            return counted[:, -N:]
        # A static cache counts on the device, and the mask may be as long as its capacity.
        places = (torch.arange(N, device=device) + past).clamp(max=counted.shape[1] - 1)
        return counted.index_select(1, places)

    def check_packed_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return what to change in the inputs so that sequences of packed rows do not see each other; see `packing`."""
        return without_cache(inputs, kept_apart=self.keeps_packed_rows_apart, kind=self._kind)

    def check_room(self, tokens: int, taken: int) -> None:
        """Raise a ValueError if there are too few positions for these tokens and those that a prompt takes."""
        if self.room is not None and tokens + taken > self.room:
            raise ValueError(
                f"the input has {tokens} tokens and the prompt takes {taken} positions, but {self._kind} has "
                f"{self.room} in all; use shorter inputs, or placement='prefix', which takes none"
            )


def _count(seen: Tensor) -> Tensor:
    """Return the number of tokens before each token of a bool `[B, N]`; 0 for padding in front."""
    return (seen.long().cumsum(1) - 1).clamp(min=0)


def padding_mask(inputs: dict[str, Any]) -> Tensor | None:
    """Return the padding mask `[B, M]` among the inputs, or None.

    A vision-language model gives its text tower complete masks, one for each kind of layer: padding is what no token
    sees in those `[B, 1, N, M]` of full attention.
    """
    mask = inputs.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4 and has_window(mask):
        return None if mask.shape[3] == 1 else padding_beside(mask)
    if mask.ndim == 4 and mask.dtype == torch.bool:
        return mask.any(2).any(1)
    return mask if mask.ndim == 2 else None


def first_position(model: PreTrainedModel) -> int:
    """Return the position id of an input's first token."""
    table = _position_table(model)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


@torch.no_grad()
def _are_taken(stack: PreTrainedModel, first: int) -> bool:
    """Return whether a stack uses `position_ids`: it compares attention's keys for two orders of them.

    A forward that names them may ignore them, and one that does not may pass them on.
    """
    if main_input(stack) != "input_ids":
        return False
    ids = dummy_inputs(stack)["input_ids"]
    ascending = torch.arange(ids.shape[1], device=ids.device)[None] + first

    def keys(positions: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        with watched(stack, lambda call: found.append(call.key)):
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


def give_positions(stack: PreTrainedModel, positions: Positions, placed: Callable[[], Shift | None]) -> RemovableHandle:
    """Give the stack position ids, until the handle is removed.

    They count the tokens of a padding mask and are moved by `placed()`; given ones are only moved.
    """
    names = argument_names(stack)

    def extended(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        """Return the stack's inputs with position ids; None, which changes nothing, if it would use the same."""
        shift, inputs = placed(), by_name(names, args, kwargs)
        changed = positions.check_packed_rows(inputs)
        counts = inputs.get("position_ids") is None and padding_mask(inputs) is not None
        if shift is not None or counts:
            own = positions.own(inputs)
            changed["position_ids"] = own if shift is None else _shifted(own, shift, positions, inputs)
        return ((), inputs | changed) if changed else None

    return stack.register_forward_pre_hook(extended, with_kwargs=True)


def _shifted(own: Tensor, shift: Shift, positions: Positions, inputs: dict[str, Any]) -> Tensor:
    tokens, past = tokens_of(inputs), past_tokens(inputs)
    if isinstance(past, int) and inputs.get("position_ids") is None:  # reading numbers on the device would wait for it
        positions.check_room(tokens.shape[1] + past, shift.at_most)
    by = shift.by.to(own.device)
    each = by if by.shape[0] == 1 else for_batch(by, tokens.shape[0])
    return own + each[:, None]


def argument_names(stack: PreTrainedModel) -> tuple[str, ...]:
    """Return the argument names of the stack's class's forward; they only serve to read a call's arguments."""
    return tuple(inspect.signature(type(stack).forward).parameters)[1:]


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    return dict(zip(names, args)) | kwargs
