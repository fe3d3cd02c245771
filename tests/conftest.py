"""A tiny BERT and toy tasks: what a run needs, small enough to train in a second."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from transformers import BertConfig, BertModel, BertTokenizerFast

torch.set_num_threads(1)  # one a worker: two workers share two cores
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

COLOURS = ["red", "green", "blue", "yellow"]
ANIMALS = ["cat", "dog", "horse", "bird"]
WORDS = ["the", "a", "is", "was", "seen", "here", "there", "old", "new", "very"]


def _tiny_config(**changes: Any) -> BertConfig:
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return BertConfig(**(sizes | {"intermediate_size": 48, "max_position_embeddings": 64} | changes))


@pytest.fixture
def tiny_config() -> Callable[..., BertConfig]:
    return _tiny_config


@pytest.fixture
def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(_tiny_config()).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[0, 6:] = 0
    mask[3, 1:] = 0
    return {"input_ids": torch.randint(5, 40, (4, 10), generator=generator), "attention_mask": mask}


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLOURS, *ANIMALS, *WORDS]))
    BertTokenizerFast(vocab=str(vocabulary)).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(_tiny_config()).save_pretrained(folder)
    return folder


def toy_rows(words: list[str], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts whose label is the one word of `words` they hold; all different."""
    draw = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = words[len(rows) % len(words)]
        text = [*draw.choices(WORDS, k=6)]
        text.insert(draw.randrange(7), label)
        rows.setdefault(" ".join(text), label)
    return list(rows.items())


@pytest.fixture(scope="session")
def toy_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four toy tasks as CSV files."""
    folder = tmp_path_factory.mktemp("toy")
    files = {}
    for name, words in {
        "colours": COLOURS[:2],
        "animals": ANIMALS[:3],
        "warm": COLOURS[2:],
        "pets": ANIMALS[2:],
    }.items():
        files[name] = folder / f"{name}.csv"
        lines = ["text,label", *(f"{text},{label}" for text, label in toy_rows(words, 48))]
        files[name].write_text("\n".join(lines))
    return files
