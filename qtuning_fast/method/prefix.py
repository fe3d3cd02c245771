"""The prefix that attention layers see in front of their context, and how it is placed on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qtuning_fast.attention.arguments import PrefixArguments


@dataclass(frozen=True)
class Prefix:
    """What the layers of a model attend to in front of their context, ready to be placed; one, or a bank of T.

    Attributes:
        layers: for each layer keyword arguments of `prefix_attention`: rows, reweighting and gate. Where there are
            embeddings, no rows.
        embeddings: `[P, E]`, or a bank `[T, P, E]`: rows that pass through the layers as tokens.
        index: `[B]` with a bank: which of them each sample uses.
        lengths: `[T]` with a bank: how many rows of each there are.
        position_shift: `[1]`, or `[T]` of a bank: by how much the context's position ids are larger than usual.
        largest_shift: the largest of these as a number, known without asking the device.
    """

    layers: Sequence[PrefixArguments]
    embeddings: Tensor | None = None
    index: Tensor | None = None
    lengths: Tensor | None = None
    position_shift: Tensor | None = None
    largest_shift: int = 0

    def with_rows(self, rows: Sequence[PrefixArguments]) -> Prefix:
        """In a causal model: the keys and values that the embeddings became, behind which the context stands."""
        assert self.embeddings is not None
        P = self.embeddings.shape[-2]
        shift = torch.tensor([P], device=self.embeddings.device) if self.lengths is None else self.lengths
        layers = [layer | row for layer, row in zip(self.layers, rows)]
        return replace(self, layers=layers, embeddings=None, position_shift=shift, largest_shift=P)

    def arguments(self) -> list[PrefixArguments]:
        """For each layer all keyword arguments of `prefix_attention`."""
        bank: PrefixArguments = {}
        if self.index is not None:
            bank["prefix_index"] = self.index
        if self.lengths is not None:
            bank["prefix_length"] = self.lengths
        return [layer | bank for layer in self.layers]


def no_prefix(key: Tensor, value: Tensor) -> PrefixArguments:
    """Arguments of `prefix_attention` for a context without a prefix, whose keys and values are these."""
    return {
        "prefix_key": key.new_empty(key.shape[1], 0, key.shape[3]),
        "prefix_value": value.new_empty(value.shape[1], 0, value.shape[3]),
        "gate": None,
    }


class PlacedPrefix(PrefixArguments, total=False):
    """A prefix on a layer. With `prompt_tokens=P` and no rows, the first P tokens of the sequence are the prefix."""

    prompt_tokens: int


# On an attention module, of PyTorch as of transformers: the prefix that it attends to now.
PREFIX = "qtuning_prefix"


def place(module: nn.Module, prefix: PrefixArguments | PlacedPrefix | None) -> None:
    """From here on a module attends to this prefix; None: to its own, or to none."""
    if prefix is None:
        module.__dict__.pop(PREFIX, None)
    else:
        setattr(module, PREFIX, prefix)


def placed(module: nn.Module) -> PlacedPrefix | None:
    """The prefix that stands on a module."""
    return getattr(module, PREFIX, None)
