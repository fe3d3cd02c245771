"""What a model answers, and how often it is right."""

from __future__ import annotations

import torch
from torch import Tensor

from qtuning_fast.lifelong.texts import TokenizedTexts
from qtuning_fast.model import QTuningModel


@torch.no_grad()
def probabilities(model: QTuningModel, texts: TokenizedTexts, batch_size: int) -> Tensor:
    """`[texts, classes]` on the CPU, under the task that is set."""
    model.eval()
    batches = texts.batches(batch_size, model.device)
    return torch.cat([model(**batch).logits.softmax(-1).cpu() for batch in batches])


def accuracy(model: QTuningModel, texts: TokenizedTexts, batch_size: int) -> float:
    """Share of the texts that the model, under the task that is set, gets right."""
    answers = probabilities(model, texts, batch_size).argmax(-1)
    return float((answers == texts.columns["labels"]).double().mean())


def features(model: QTuningModel, texts: TokenizedTexts, batch_size: int, *, task: str | None) -> Tensor:
    """Pooled features `[texts, hidden]` on the CPU, under a finished task or of the base model alone."""
    batches = texts.batches(batch_size, model.device)
    return torch.cat([model.features(batch, task=task).cpu() for batch in batches])
