"""`placement="input"` in bidirectional models: a prompt's rows stand in front of the input as tokens (Q-tuning).

A causal model needs none of this: there the prompt's keys and values do not depend on what comes after it.
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
from qtuning_fast.integrations.transformers.positions import Positions, argument_names, by_name


@dataclass(frozen=True)
class Prompt:
    """The rows that stand in front of a batch.

    Attributes:
        embeddings: `[P, E]`, or a bank `[T, P, E]`.
        index: `[B]` with a bank: which of them each sample uses.
        lengths: `[T]` with a bank whose prompts differ in length; shorter ones stand next to the context.
    """

    embeddings: Tensor
    index: Tensor | None = None
    lengths: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.embeddings.shape[-2]

    def rows(self, like: Tensor) -> Tensor:
        """`[B, P, E]`, for inputs `like` these, `[B, N, E]`."""
        rows = self.embeddings
        if self.index is None:
            return rows.to(like).expand(len(like), -1, -1)
        index = for_batch(self.index.to(rows.device), len(like))
        absent = self.absent(len(like), rows.device)
        if absent is None:
            return rows[index].to(like)
        places = (torch.arange(self.tokens, device=rows.device) - absent[:, None]) % self.tokens
        return rows[index[:, None], places].to(like)

    def absent(self, batch: int, device: torch.device) -> Tensor | None:
        """`[B]`, how many of the first rows are none; None where all are there."""
        if self.lengths is None or self.index is None:
            return None
        return self.tokens - for_batch(self.lengths[self.index].to(device), batch)

    def mask(self, batch: int, device: torch.device) -> Tensor | None:
        """`[B, P]` bool, False for rows that are none; None where all are there."""
        absent = self.absent(batch, device)
        return None if absent is None else torch.arange(self.tokens, device=device) >= absent[:, None]


Placed = Callable[[], Prompt | None]
"""The prompt that stands in front of the input now, if any. Hooks ask for it at each call and stay where they are."""


def put_in_front(
    model: PreTrainedModel, encoder: PreTrainedModel, positions: Positions, placed: Placed
) -> list[RemovableHandle]:
    """From here on the placed prompt stands in front of what `encoder` of `model` is given, until handles are removed.

    Raises:
        NotImplementedError: an image model without a module of the name `embeddings`.
    """
    if encoder.main_input_name == "pixel_values":
        return [_in_front_of_patches(encoder, placed)]
    handles = [_in_front_of_tokens(encoder, positions, placed)]
    if model.config.is_encoder_decoder:
        handles.append(_in_front_of_memory(model.get_decoder(), placed))
    table = getattr(encoder, "embed_positions", None)
    if isinstance(table, nn.Module) and not positions.are_taken:
        handles.append(_positions_without_absent_rows(table, placed))
    return handles


def _in_front_of_tokens(encoder: PreTrainedModel, positions: Positions, placed: Placed) -> RemovableHandle:
    """The prompt's embeddings in front of the tokens', and all that goes along with a longer input."""
    names = argument_names(encoder)

    def extended(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
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
    """Positions `[1 or B, P + N]`: the prompt's rows take the first ones, and the context follows."""
    absent = prompt.absent(B, device)
    missing = 0 if absent is None else absent[:, None]
    own = positions.own(inputs) + prompt.tokens - missing
    front = (torch.arange(prompt.tokens, device=device)[None] - missing).clamp(min=0) + positions.first
    return torch.cat([front.expand(len(own), -1), own], dim=1)


def _in_front_of_memory(decoder: PreTrainedModel, placed: Placed) -> RemovableHandle:
    """Cross-attention sees the prompt's rows of the encoder's output too, so its padding mask grows with them."""
    names = argument_names(decoder)

    def extended(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        prompt, inputs = placed(), by_name(names, args, kwargs)
        memory, mask = inputs.get("encoder_hidden_states"), inputs.get("encoder_attention_mask")
        if prompt is None or memory is None:
            return None
        N = memory.shape[1] - prompt.tokens
        return (), inputs | {"encoder_attention_mask": _extended_mask(mask, prompt, len(memory), N, memory.device)}

    return decoder.register_forward_pre_hook(extended, with_kwargs=True)


def _in_front_of_patches(encoder: PreTrainedModel, placed: Placed) -> RemovableHandle:
    """The prompt's rows in front of what an image was embedded as."""
    modules = (module for name, module in encoder.named_modules() if name.split(".")[-1] == "embeddings")
    embeddings = next(modules, None)
    if embeddings is None:
        raise NotImplementedError(f"{type(encoder).__name__} has no module `embeddings`; use placement='prefix'")

    def extended(module: Any, args: Any, output: Tensor) -> Tensor:
        prompt = placed()
        return output if prompt is None else torch.cat([prompt.rows(output), output], dim=1)

    return embeddings.register_forward_hook(extended)


def _positions_without_absent_rows(embed_positions: nn.Module, placed: Placed) -> RemovableHandle:
    """Where positions follow the sequence, each sample's first row that is there takes the first position."""

    def moved(module: Any, args: Any, output: Tensor) -> Tensor:
        prompt = placed()
        if prompt is None or prompt.index is None or prompt.lengths is None:
            return output
        batch = max(len(output), len(prompt.index))
        absent = prompt.absent(batch, output.device)
        assert absent is not None
        places = (torch.arange(output.shape[1], device=output.device) - absent[:, None]).clamp(min=0)
        return output.expand(batch, -1, -1).gather(1, places[..., None].expand(-1, -1, output.shape[2]))

    return embed_positions.register_forward_hook(moved)


def _extended_mask(mask: Tensor | None, prompt: Prompt, B: int, N: int, device: torch.device) -> Tensor | None:
    """The padding mask `[B, N]` with the prompt's rows in front, `[B, P + N]`; None stays None where all are seen."""
    front = prompt.mask(B, device)
    if mask is None and front is None:
        return None
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; with placement='input' it must be [B, N]")
    mask = torch.ones(B, N, dtype=torch.long, device=device) if mask is None else mask
    front = torch.ones(B, prompt.tokens, dtype=torch.bool, device=device) if front is None else front
    return torch.cat([front.to(mask.dtype), mask.to(device)], dim=1)
