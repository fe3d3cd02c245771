"""Examples as tensors, for training, evaluation and the linear probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qtuning_fast.method.labels import IGNORED

FALLBACK_PAD_TOKEN = 0  # for tokenizers without a padding token, such as those of many decoders; the mask hides it


class EncodedExamples(Dataset[dict[str, Tensor]]):
    """The inputs of a model and their `labels`, as columns with one row per example.

    Args:
        columns: tensors `[examples, ...]` by name; `labels` is one of them.
    """

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def rows(self, chosen: slice) -> dict[str, Tensor]:
        """The columns of some examples, `[chosen, ...]` each."""
        return {name: column[chosen] for name, column in self.columns.items()}

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in self.rows(slice(index, index + 1)).items()}

    def with_column(self, name: str, column: Tensor) -> EncodedExamples:
        """The same examples with a column `[examples, ...]` added or replaced."""
        extended = copy(self)
        extended.columns = self.columns | {name: column}
        return extended

    def subset(self, chosen: Sequence[int]) -> EncodedExamples:
        """Some of the examples, by their places."""
        places = torch.tensor(chosen, dtype=torch.long)
        part = copy(self)
        part.columns = {name: column[places] for name, column in self.columns.items()}
        return part

    def by_length(self) -> tuple[EncodedExamples, Tensor]:
        """The examples from the shortest to the longest text, and their places `[examples]`; see `in_order`."""
        mask = self.columns.get("attention_mask")
        places = torch.arange(len(self)) if mask is None else mask.sum(1).argsort(stable=True)
        return self.subset(places.tolist()), places

    def batches(self, batch_size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """The inputs without labels, in order, on the device; no batch is longer than its longest text."""
        for number in range(self.batch_count(batch_size)):
            yield self.batch(number, batch_size, device)

    def batch_count(self, batch_size: int) -> int:
        """The number of batches."""
        return -(-len(self) // batch_size)

    def batch(self, number: int, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """One of `batches`, by its number."""
        rows = self.labelled_batch(number, batch_size)
        return {name: column.to(device) for name, column in rows.items() if name != "labels"}

    def labelled_batch(self, number: int, batch_size: int) -> dict[str, Tensor]:
        """The inputs of a batch with their labels; it is no longer than its longest text."""
        return without_padding(self.rows(slice(number * batch_size, (number + 1) * batch_size)))


class TextExamples(EncodedExamples):
    """Examples with the texts that they encode, which a language model reads in the template of a task.

    Args:
        columns: as of `EncodedExamples`.
        texts: the text of each example.
    """

    def __init__(self, columns: dict[str, Tensor], texts: Sequence[str]) -> None:
        super().__init__(columns)
        self.texts = list(texts)

    def subset(self, chosen: Sequence[int]) -> TextExamples:
        part = cast(TextExamples, super().subset(chosen))
        part.texts = [self.texts[place] for place in chosen]
        return part


_PADDED = ("input_ids", "attention_mask", "token_type_ids")


def without_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut off the columns behind the longest text of a batch, and those of its labels that leave out every token."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is None:
        return batch
    cut = _without_columns_behind(mask != 0)
    lengths = dict.fromkeys(_PADDED, cut)
    if labels is not None and labels.shape == mask.shape:  # of a decoder, which has a label for each token
        lengths = dict.fromkeys((*_PADDED, "labels"), max(cut, _without_columns_behind(labels != IGNORED)))
    return {name: column[:, : lengths[name]] if name in lengths else column for name, column in batch.items()}


def _without_columns_behind(used: Tensor) -> int:
    """Return the number of columns up to the last one with an entry that is used; all, if none is."""
    columns = used.any(0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else used.shape[1]


def in_order(rows: Tensor, places: Tensor) -> Tensor:
    """Put rows `[examples, ...]` that were computed of `by_length` back in the order of the examples."""
    return torch.empty_like(rows).index_copy_(0, places, rows)


def pad_rows(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    """The rows as a tensor `[rows, length]`, padded on the right."""
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def tokenize_texts(texts: Sequence[Any], tokenizer: Any, max_length: int, labels: Sequence[Any]) -> EncodedExamples:
    """Tokenize texts for models with heads; each text is cut or padded to `max_length` tokens."""
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
