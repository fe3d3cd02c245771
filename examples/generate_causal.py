"""Train two tasks on a decoder, from a few pairs of texts each, and generate under either of them.

Shows: training a gated prefix on pairs of texts, `generate` with a cache, with beams, and both tasks in one batch.
Needs: pip install 'qtuning_fast[lifelong]', and the model by name from the Hugging Face hub or as a folder.
Takes: two times 60 steps of one batch of six pairs; how long depends on the model.

    python examples/generate_causal.py
    python examples/generate_causal.py --model Qwen/Qwen3-0.6B --steps 100
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedTokenizerBase

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.lifelong import load_base_model

TASKS = {
    "opposite": {"hot": "cold", "big": "small", "fast": "slow", "old": "new", "full": "empty", "early": "late"},
    "french": {"hot": "chaud", "big": "grand", "fast": "rapide", "old": "vieux", "full": "plein", "early": "tôt"},
}
QUESTION = "Word: {} Answer:"


def lessons(tokenizer: PreTrainedTokenizerBase, pairs: dict[str, str]) -> dict[str, torch.Tensor]:
    """All pairs as one batch; the loss counts the answer and the token that ends it."""
    ids, labels = [], []
    for word, answer in pairs.items():
        question = tokenizer(QUESTION.format(word))["input_ids"]
        written = [*tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids.append(torch.tensor(question + written))
        labels.append(torch.tensor([-100] * len(question) + written))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def learn(model: QTuningModel, name: str, batch: dict[str, torch.Tensor], steps: int) -> list[float]:
    """Train the prompt of one task; returns the loss of each step."""
    batch = {key: value.to(model.device) for key, value in batch.items()}
    model.start_task(name)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    model.finish_task()
    return losses


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a folder, or a name on the hub")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps for each task")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(0)
    console = Console(highlight=False, markup=False)

    base, tokenizer = load_base_model(options.model, "causal-lm")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {options.model} has no token that ends a text, which answers need here")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # so that every answer begins where its question ends
    model = QTuningModel(base, QTuningConfig(task_type="causal-lm", prompt_length=10, shared_length=0))

    losses = {}
    for name, pairs in TASKS.items():
        losses[name] = learn(model, name, lessons(tokenizer, pairs), options.steps)
        console.print(f"{name}: loss {losses[name][0]:.2f}, in the end {losses[name][-1]:.3f}")

    words = list(TASKS["opposite"])
    asked: BatchEncoding = tokenizer([QUESTION.format(word) for word in words], padding=True, return_tensors="pt")
    asked = asked.to(model.device)
    writing = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}

    def write(**how: Any) -> list[str]:
        written = model.generate(**asked, **writing, **how)[:, asked["input_ids"].shape[1] :]
        return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]

    model.set_task(None)
    found = {"base model": write()}
    uncached = {}
    for name in TASKS:
        model.set_task(name)
        found[name] = write()  # with a cache, which holds the context and no prefix
        uncached[name] = write(use_cache=False)
    mixed = [list(TASKS)[row % 2] for row in range(len(words))]
    found["by turns"] = write(task_names=mixed)  # one batch, each row under its own task
    found["with beams"] = write(task_names=mixed, num_beams=3)
    same = all(found[name] == uncached[name] for name in TASKS)

    table = Table("word")
    for column in found:
        table.add_column(column, no_wrap=True, max_width=12)
    for row, word in enumerate(words):
        table.add_row(word, *(found[column][row] for column in found))
    console.print(table)
    console.print(f"without a cache: {'the same' if same else 'not the same, as rounding may have it in 16 bits'}")
    return {"losses": losses, "found": found, "uncached": uncached, "mixed": mixed}


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
