"""Examples as tensors, as a trainer, an evaluation and a linear probe take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

FALLBACK_PAD_TOKEN = 0  # pads where a tokenizer has no token for it, as those of many decoders; the mask hides it


class EncodedExamples(Dataset[dict[str, Tensor]]):
    """Examples as a model's inputs with `labels`: columns of one row an example.

    Args:
        columns: `[examples, ...]` each, `labels` among them.
    """

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def rows(self, chosen: slice) -> dict[str, Tensor]:
        """Some examples, `[chosen, ...]` each."""
        return {name: column[chosen] for name, column in self.columns.items()}

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in self.rows(slice(index, index + 1)).items()}

    def with_column(self, name: str, column: Tensor) -> EncodedExamples:
        """The same examples with one more column, or another one of that name, `[examples, ...]`."""
        extended = copy(self)
        extended.columns = self.columns | {name: column}
        return extended

    def batches(self, batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """The inputs in order, without labels."""
        for start in range(0, len(self), batch_size):
            rows = self.rows(slice(start, start + batch_size))
            yield {name: column.to(device) for name, column in rows.items() if name != "labels"}


def pad_rows(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    """`[rows, length]`, each row filled up on the right."""
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def tokenize_texts(texts: Sequence[Any], tokenizer: Any, max_length: int, labels: Sequence[int]) -> EncodedExamples:
    """Texts as the tokenizer's tensors, every text cut or padded to `max_length` tokens, for models with heads."""
    asked = {"truncation": True, "max_length": max_length, "return_attention_mask": True}
    if tokenizer.pad_token_id is None:
        given = tokenizer(list(texts), **asked)
        encoded = {
            name: pad_rows(rows, max_length, FALLBACK_PAD_TOKEN if name == "input_ids" else 0)
            for name, rows in given.items()
        }
    else:
        encoded = dict(tokenizer(list(texts), padding="max_length", return_tensors="pt", **asked))
    return EncodedExamples(encoded | {"labels": torch.tensor(labels)})
