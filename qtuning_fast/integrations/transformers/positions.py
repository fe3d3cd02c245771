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


class Positions:
    """How a stack gives its tokens positions, found once: by what it is made of, not by its name.

    Args:
        stack: what reads tokens; a model around it will do.

    Attributes:
        are_taken: whether its forward takes `position_ids`; otherwise positions follow the sequence.
        first: the position id of the first token.
        room: how many tokens there are positions for; None where no learned table of them ends.
    """

    def __init__(self, stack: PreTrainedModel) -> None:
        self.are_taken = "position_ids" in argument_names(stack)
        table = _position_table(stack)
        # Positions start behind the padding's and count what is no padding, as in RoBERTa; None: they do not.
        self._padding = None if table is None else table.padding_idx
        self.first = 0 if self._padding is None else self._padding + 1
        limit = getattr(stack.config, "max_position_embeddings", None)
        self.room = None if limit is None or table is None else limit - self.first
        # OPT too leaves padding out, but by the mask, and its table starts two places late without saying so.
        self._count_by_mask = stack.config.model_type == "opt"
        self._kind = type(stack).__name__

    def own(self, inputs: dict[str, Any]) -> Tensor:
        """The `[1 or B, N]` position ids with which the stack would compute of these inputs, by name."""
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
        """Raise a ValueError where there are no positions for so many tokens beside those that a prompt takes."""
        if self.room is not None and tokens + taken > self.room:
            raise ValueError(
                f"the input has {tokens} tokens and the prompt takes {taken} positions, but {self._kind} has "
                f"{self.room} in all; use shorter inputs, or placement='prefix', which takes none"
            )


def _position_table(stack: PreTrainedModel) -> nn.Embedding | None:
    """The learned embedding of positions, where there is one."""
    for name, module in stack.named_modules():
        last = name.split(".")[-1]
        if isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last):
            return module
    return None


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """The input's token ids `[B, N]`, or the embeddings `[B, N, E]` that stand for them."""
    return inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]


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
    positions, names = Positions(stack), argument_names(stack)

    def shifted(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        shift = placed()
        if shift is None:
            return None
        inputs = by_name(names, args, kwargs)
        own, tokens, past = positions.own(inputs), tokens_of(inputs), past_tokens(inputs)
        if isinstance(past, int):  # a static cache counts on the device, where asking would wait for it
            positions.check_room(tokens.shape[1] + past, shift.at_most)
        by = shift.by.to(own.device)
        each = by if len(by) == 1 else for_batch(by, len(tokens))
        return (), inputs | {"position_ids": own + each[:, None]}

    return stack.register_forward_pre_hook(shifted, with_kwargs=True)


def argument_names(stack: PreTrainedModel) -> tuple[str, ...]:
    """Of the stack's forward, as its class has it."""
    return tuple(inspect.signature(type(stack).forward).parameters)[1:]


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return dict(zip(names, args)) | kwargs
