"""`placement="input"` in bidirectional models: a prompt's rows are tokens in front of the input (Q-tuning).

A causal model does not need this module: its keys and values of the prompt do not depend on later tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from qtuning_fast.integrations.transformers.interface import for_batch
from qtuning_fast.integrations.transformers.layers import main_input
from qtuning_fast.integrations.transformers.positions import Positions, argument_names, by_name


@dataclass(frozen=True)
class Prompt:
    """The prompt in front of a batch.

    Attributes:
        embeddings: `[P, E]`, or a bank `[T, P, E]`.
        index: `[B]`, only with a bank: the prompt of each sample.
        lengths: `[T]`, only with a bank of prompts of different lengths; shorter ones are next to the context.
    """

    embeddings: Tensor
    index: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.embeddings.shape[-2]

    def rows(self, like: Tensor) -> Tensor:
        """Return the rows `[B, P, E]` for inputs `like` these, `[B, N, E]`."""
        rows = self.embeddings
        if self.index is None:
            return rows.to(like).expand(like.shape[0], -1, -1)
        index = for_batch(self.index.to(rows.device), like.shape[0])
        absent = self.absent(like.shape[0], rows.device)
        if absent is None:
            return rows[index].to(like)
        places = (torch.arange(self.tokens, device=rows.device) - absent[:, None]) % self.tokens
        return rows[index[:, None], places].to(like)

    def absent(self, batch: int, device: torch.device) -> Tensor | None:
        """Return the number of absent leading rows, `[B]`; None if no row is absent."""
        if self.lengths is None or self.index is None:
            return None
        return self.tokens - for_batch(self.lengths[self.index].to(device), batch)

    def mask(self, batch: int, device: torch.device) -> Tensor | None:
        """Return a bool `[B, P]`, False for absent rows; None if no row is absent."""
        absent = self.absent(batch, device)
        return None if absent is None else torch.arange(self.tokens, device=device) >= absent[:, None]


Placed = Callable[[], Prompt | None]
"""Returns the current prompt in front of the input, if any. Hooks stay registered and call it each time."""


def put_in_front(
    model: PreTrainedModel, encoder: PreTrainedModel, positions: Positions, placed: Placed
) -> list[RemovableHandle]:
    """Put the placed prompt in front of the inputs of `model`'s `encoder`, until the handles are removed.

    Raises:
        NotImplementedError: an image model has no module named `embeddings`.
    """
    if main_input(encoder) == "pixel_values":
        return [_in_front_of_patches(encoder, placed)]
    handles = [_in_front_of_tokens(encoder, positions, placed)]
    if model.config.is_encoder_decoder:
        handles.append(_in_front_of_memory(model.get_decoder(), placed))
    table = getattr(encoder, "embed_positions", None)
    if isinstance(table, nn.Module) and not positions.are_taken:
        handles.append(_positions_without_absent_rows(table, placed))
    return handles


def _in_front_of_tokens(encoder: PreTrainedModel, positions: Positions, placed: Placed) -> RemovableHandle:
    """Put the prompt's embeddings in front of the tokens', and extend masks and positions."""
    names = argument_names(encoder)

    def extended(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        """Return the stack's inputs with the prompt in front; None, which changes nothing, without a prompt."""
        prompt = placed()
        if prompt is None:
            return None
        inputs = by_name(names, args, kwargs)
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            embeds = encoder.get_input_embeddings()(inputs["input_ids"])
        longer = inputs | {"input_ids": None, "inputs_embeds": torch.cat([prompt.rows(embeds), embeds], dim=1)}
        B, N, _ = embeds.shape
        positions.check_room(N, prompt.tokens)
        longer["attention_mask"] = _extended_mask(inputs.get("attention_mask"), prompt, B, N, embeds.device)
        if inputs.get("token_type_ids") is not None:
            longer["token_type_ids"] = F.pad(inputs["token_type_ids"], (prompt.tokens, 0))
        if positions.are_taken:
            longer["position_ids"] = _extended_positions(positions, inputs, prompt, B, embeds.device)
        return (), longer

    return encoder.register_forward_pre_hook(extended, with_kwargs=True)


def _extended_positions(
    positions: Positions, inputs: dict[str, Any], prompt: Prompt, B: int, device: torch.device
) -> Tensor:
    """Return positions `[1 or B, P + N]`: the prompt's rows come first, then the context."""
    absent = prompt.absent(B, device)
    missing = 0 if absent is None else absent[:, None]
    own = positions.own(inputs) + prompt.tokens - missing
    front = (torch.arange(prompt.tokens, device=device)[None] - missing).clamp(min=0) + positions.first
    return torch.cat([front.expand(own.shape[0], -1), own], dim=1)


def _in_front_of_memory(decoder: PreTrainedModel, placed: Placed) -> RemovableHandle:
    """Extend the padding mask of cross-attention, which also sees the prompt's rows of the encoder's output."""
    names = argument_names(decoder)

    def extended(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        """Return the decoder's inputs with the longer mask; None, which changes nothing, without a prompt."""
        prompt, inputs = placed(), by_name(names, args, kwargs)
        memory, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
        if prompt is None or memory is None:
            return None
        N = memory.shape[1] - prompt.tokens
        return (), inputs | {"encoder_attention_mask": _extended_mask(mask, prompt, memory.shape[0], N, memory.device)}

    return decoder.register_forward_pre_hook(extended, with_kwargs=True)


def _in_front_of_patches(encoder: PreTrainedModel, placed: Placed) -> RemovableHandle:
    """Put the prompt's rows in front of an image's embeddings."""
    modules = (module for name, module in encoder.named_modules() if name.split(".")[-1] == "embeddings")
    embeddings = next(modules, None)
    if embeddings is None:
        raise NotImplementedError(f"{type(encoder).__name__} has no module `embeddings`; use placement='prefix'")

    def extended(module: Any, args: Any, output: Tensor) -> Tensor:
        """Return the embeddings `[B, N, E]` as `[B, P + N, E]`."""
        prompt = placed()
        return output if prompt is None else torch.cat([prompt.rows(output), output], dim=1)

    return embeddings.register_forward_hook(extended)


def _positions_without_absent_rows(embed_positions: nn.Module, placed: Placed) -> RemovableHandle:
    """If positions follow the sequence, give the first position to each sample's first row that is not absent."""

    def moved(module: Any, args: Any, output: Tensor) -> Tensor:
        """Return the embeddings of positions `[B, P + N, E]`, each sample's moved by its absent rows."""
        prompt = placed()
        if prompt is None or prompt.index is None or prompt.lengths is None:
            return output
        batch = max(output.shape[0], prompt.index.shape[0])
        absent = prompt.absent(batch, output.device)
        assert absent is not None
        places = (torch.arange(output.shape[1], device=output.device) - absent[:, None]).clamp(min=0)
        return output.expand(batch, -1, -1).gather(1, places[..., None].expand(-1, -1, output.shape[2]))

    return embed_positions.register_forward_hook(moved)


def _extended_mask(mask: Tensor | None, prompt: Prompt, B: int, N: int, device: torch.device) -> Tensor | None:
    """Extend the padding mask `[B, N]` by the prompt's rows to `[B, P + N]`; None stays None if no row is absent."""
    front = prompt.mask(B, device)
    if mask is None and front is None:
        return None
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; with placement='input' it must be [B, N]")
    mask = torch.ones(B, N, dtype=torch.long, device=device) if mask is None else mask
    front = torch.ones(B, prompt.tokens, dtype=torch.bool, device=device) if front is None else front
    return torch.cat([front.to(mask.dtype), mask.to(device)], dim=1)
