"""Evaluate a model on examples: probabilities, accuracy and features."""

from __future__ import annotations

import torch
from torch import Tensor

from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.model.model import QTuningModel
from qtuning_fast.model.scoring import Answers, answer_scores


@torch.no_grad()
def probabilities(
    model: QTuningModel, examples: EncodedExamples, batch_size: int, answers: Answers | None = None
) -> Tensor:
    """Probabilities of the classes under the current task, `[examples, classes]` on the CPU.

    A language model gives each of `answers`, one per class, a probability; they are scaled to sum to one.
    """
    with model.evaluating():
        scores = (
            model(**batch).logits if answers is None else answer_scores(model, batch, answers)
            for batch in examples.batches(batch_size, model.device)
        )
        return torch.cat([each.softmax(-1).cpu() for each in scores])


def accuracy(model: QTuningModel, examples: EncodedExamples, batch_size: int, answers: Answers | None = None) -> float:
    """The share of the examples that the model classifies correctly; for the arguments see `probabilities`."""
    chosen = probabilities(model, examples, batch_size, answers).argmax(-1)
    return float((chosen == examples.columns["labels"]).double().mean())


def features(model: QTuningModel, examples: EncodedExamples, batch_size: int, *, task: str | None) -> Tensor:
    """Pooled features `[examples, hidden]` on the CPU, under a finished task; None means the base model alone."""
    batches = examples.batches(batch_size, model.device)
    return torch.cat([model.features(batch, task=task).cpu() for batch in batches])
