"""Texts as tensors: every example of a task at one length."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qtuning_fast.lifelong.tasks import Examples


class TokenizedTexts(Dataset[dict[str, Tensor]]):
    """Examples as the tokenizer's tensors with `labels`, and further columns of one row an example.

    Args:
        examples: texts and class indices.
        tokenizer: of the base model.
        max_length: tokens that every text is cut or padded to.
    """

    def __init__(self, examples: Examples, tokenizer: Any, max_length: int) -> None:
        encoded = tokenizer(
            list(examples.texts), padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
        )
        self.columns: dict[str, Tensor] = dict(encoded) | {"labels": torch.tensor(examples.labels)}

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def with_column(self, name: str, column: Tensor) -> TokenizedTexts:
        """The same examples with one more column, `[examples, ...]`."""
        extended = copy(self)
        extended.columns = self.columns | {name: column}
        return extended

    def batches(self, batch_size: int, device: torch.device) -> list[dict[str, Tensor]]:
        """The inputs in order, without labels."""
        inputs = {name: column for name, column in self.columns.items() if name != "labels"}
        return [
            {name: column[start : start + batch_size].to(device) for name, column in inputs.items()}
            for start in range(0, len(self), batch_size)
        ]
