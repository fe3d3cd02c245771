"""The prefix in front of the context of attention layers, and its placement on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qtuning_fast.attention.arguments import PrefixArguments


@dataclass(frozen=True)
class Prefix:
    """The prefix of a model's layers, ready to be placed: a single one, or a bank of T.

    Attributes:
        layers: for each layer keyword arguments of `prefix_attention`: rows, reweighting and gate; no rows if there
            are embeddings.
        embeddings: `[P, E]`, or a bank `[T, P, E]`: rows that pass through the layers as tokens.
        index: `[B]`, only with a bank: the prefix of each sample.
        lengths: `[T]`, only with a bank: the number of rows of each prefix.
        position_shift: `[1]`, or `[T]` with a bank: the number added to the context's position ids.
        largest_shift: the maximum of `position_shift` as a number, known without a read from the device.
    """

    layers: Sequence[PrefixArguments]
    embeddings: Tensor | None = None
    index: Tensor | None = None
    lengths: Tensor | None = None
    position_shift: Tensor | None = None
    largest_shift: int = 0

    def with_rows(self, rows: Sequence[PrefixArguments]) -> Prefix:
        """Replace the embeddings by the keys and values that they became in a causal model, in front of the context."""
        assert self.embeddings is not None
        P = self.embeddings.shape[-2]
        shift = torch.tensor([P], device=self.embeddings.device) if self.lengths is None else self.lengths
        layers = [layer | row for layer, row in zip(self.layers, rows)]
        return replace(self, layers=layers, embeddings=None, position_shift=shift, largest_shift=P)

    def arguments(self) -> list[PrefixArguments]:
        """Return all keyword arguments of `prefix_attention` for each layer."""
        bank: PrefixArguments = {}
        if self.index is not None:
            bank["prefix_index"] = self.index
        if self.lengths is not None:
            bank["prefix_length"] = self.lengths
        return [layer | bank for layer in self.layers]


def no_prefix(key: Tensor, value: Tensor) -> PrefixArguments:
    """Return arguments of `prefix_attention` for a context with these keys and values and no prefix."""
    return {
        "prefix_key": key.new_empty(key.shape[1], 0, key.shape[3]),
        "prefix_value": value.new_empty(value.shape[1], 0, value.shape[3]),
        "gate": None,
    }


class PlacedPrefix(PrefixArguments, total=False):
    """The prefix on a layer. With `prompt_tokens=P` and no rows, the first P tokens of the sequence are the prefix."""

    prompt_tokens: int


# The attribute of an attention module, PyTorch's or transformers', that holds its current prefix.
PREFIX = "qtuning_prefix"


def place(module: nn.Module, prefix: PrefixArguments | PlacedPrefix | None) -> None:
    """Make a module attend to this prefix; with None, to its own prefix or to none."""
    if prefix is not None:
        setattr(module, PREFIX, prefix)
    elif hasattr(module, PREFIX):  # in a form that PyTorch 2.11 can compile, which reads no deleted attribute
        if torch.compiler.is_dynamo_compiling():
            setattr(module, PREFIX, None)
        else:
            delattr(module, PREFIX)


def placed(module: nn.Module) -> PlacedPrefix | None:
    """Return the prefix placed on a module, or None."""
    return getattr(module, PREFIX, None)
