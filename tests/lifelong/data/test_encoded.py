"""Examples as tensors: rows, batches, and how texts are padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtuning_fast.lifelong.data.encoded import EncodedExamples, pad_rows, tokenize_texts


@pytest.fixture
def examples() -> EncodedExamples:
    return EncodedExamples({"input_ids": torch.arange(10).view(5, 2), "labels": torch.tensor([0, 1, 0, 1, 1])})


def test_an_example_is_a_row_of_each_column(examples: EncodedExamples) -> None:
    assert len(examples) == 5
    assert examples[3]["input_ids"].tolist() == [6, 7] and examples[3]["labels"] == 1
    assert examples.rows(slice(1, 3))["labels"].tolist() == [1, 0]


def test_batches_are_in_order_and_without_labels(examples: EncodedExamples) -> None:
    batches = list(examples.batches(2, torch.device("cpu")))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert all(batch.keys() == {"input_ids"} for batch in batches)
    assert torch.cat([batch["input_ids"] for batch in batches]).equal(examples.columns["input_ids"])


def test_a_further_column_leaves_the_examples_as_they_were(examples: EncodedExamples) -> None:
    more = examples.with_column("weights", torch.ones(5))
    assert more[0].keys() == {"input_ids", "labels", "weights"} and "weights" not in examples.columns
    other = examples.with_column("labels", torch.zeros(5, 3))
    assert other[0]["labels"].shape == (3,) and examples[0]["labels"].shape == ()


def test_rows_are_filled_up_on_the_right() -> None:
    assert pad_rows([[1, 2], [], [3]], 2, 9).tolist() == [[1, 2], [9, 9], [3, 9]]


@pytest.mark.parametrize("decoder", [False, True])  # with and without a token for padding
def test_texts_are_cut_and_padded_to_one_length(decoder: bool, make_tokenizer: Any) -> None:
    examples = tokenize_texts(["red", "a very old red cat is new"], make_tokenizer(decoder=decoder), 5, [1, 0])
    assert examples.columns["input_ids"].shape == (2, 5)
    assert examples.columns["attention_mask"].sum(1).tolist() == [2, 5]
    assert examples.columns["input_ids"][0, 2:].tolist() == [0, 0, 0]
    assert examples.columns["labels"].tolist() == [1, 0]
