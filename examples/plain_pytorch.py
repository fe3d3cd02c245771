"""Train only prefixes in a model of plain PyTorch: `replace_attention` on `nn.TransformerEncoder`.

A small model learns to answer about one of three words, which a fourth word in front names: "colour red big cat" gives
"red". Then the fourth word is hidden and the model frozen. One prefix for each question learns to replace that word.

Needs: pip install qtuning_fast rich.
Takes: 15 s on one of two CPU cores.

    python examples/plain_pytorch.py
"""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qtuning_fast import replace_attention, restore_attention

QUESTIONS = ["colour", "size", "animal"]
HIDDEN = len(QUESTIONS)  # the token of a question that is hidden
WORDS = 6  # for each question


class Reader(nn.Module):
    """Answers from tokens `[B, 4]`, a question and three words; nothing in it knows of prefixes."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(HIDDEN + 1 + 3 * WORDS, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.answer = nn.Linear(width, 3 * WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.answer(self.encoder(self.tokens(tokens))[:, 0])


def batch(question: int | None, hidden: bool | None, size: int = 128) -> tuple[Tensor, Tensor]:
    """Tokens and answers; None: any question, hidden in a quarter of the rows."""
    words = torch.randint(WORDS, (size, 3)) + WORDS * torch.arange(3)
    asked = torch.randint(3, (size,)) if question is None else torch.full((size,), question)
    is_hidden = torch.rand(size) < 0.25 if hidden is None else torch.full((size,), hidden)
    shown = asked.masked_fill(is_hidden, HIDDEN)
    return torch.cat([shown[:, None], words + HIDDEN + 1], dim=1), words[torch.arange(size), asked]


def train(model: nn.Module, question: int | None, hidden: bool | None, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        tokens, answers = batch(question, hidden)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), answers).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, question: int, hidden: bool) -> float:
    tokens, answers = batch(question, hidden, size=1000)
    return (model(tokens).argmax(-1) == answers).float().mean().item()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps for the model, and for each prefix")
    parser.add_argument("--rows", type=int, default=4, help="rows of a prefix")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    console = Console(highlight=False, markup=False)

    model = Reader()
    train(model, None, None, options.steps, rate=3e-3)
    model.eval()
    shown = {name: accuracy(model, number, hidden=False) for number, name in enumerate(QUESTIONS)}
    alone = {name: accuracy(model, number, hidden=True) for number, name in enumerate(QUESTIONS)}
    before = copy.deepcopy(model.state_dict())

    changed = replace_attention(model, prefix_length=options.rows, gate="tanh")
    console.print(f"a prefix in {', '.join(changed)}")
    fresh = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    numbers = [sum(tensor.numel() for tensor in state.values()) for state in (fresh, before)]
    console.print(f"{numbers[0]:,} parameters train, {numbers[1]:,} do not")
    prefixes = {}
    for number, name in enumerate(QUESTIONS):
        model.load_state_dict(fresh, strict=False)
        train(model, number, True, options.steps, rate=1e-2)
        prefixes[name] = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}

    under = {}
    for number, name in enumerate(QUESTIONS):
        model.load_state_dict(prefixes[name], strict=False)  # another prefix, another question
        under[name] = accuracy(model, number, hidden=True)
    restore_attention(model)  # the model that it was
    restored = all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    table = Table("question", "shown", "hidden", "hidden, with its prefix", title="accuracy")
    for name in QUESTIONS:
        table.add_row(name, f"{shown[name]:.3f}", f"{alone[name]:.3f}", f"{under[name]:.3f}")
    console.print(table)
    return {"shown": shown, "hidden": alone, "prefix": under, "restored": restored}


if __name__ == "__main__":
    main()
