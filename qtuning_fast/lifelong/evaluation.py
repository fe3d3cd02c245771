"""What a model answers, and how often it is right."""

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
    """`[examples, classes]` on the CPU, under the task that is set.

    A language model chooses among `answers`, one a class: their probabilities, scaled to sum to one.
    """
    with model.evaluating():
        scores = (
            model(**batch).logits if answers is None else answer_scores(model, batch, answers)
            for batch in examples.batches(batch_size, model.device)
        )
        return torch.cat([each.softmax(-1).cpu() for each in scores])


def accuracy(model: QTuningModel, examples: EncodedExamples, batch_size: int, answers: Answers | None = None) -> float:
    """Share of the examples that the model, under the task that is set, gets right; arguments as above."""
    chosen = probabilities(model, examples, batch_size, answers).argmax(-1)
    return float((chosen == examples.columns["labels"]).double().mean())


def features(model: QTuningModel, examples: EncodedExamples, batch_size: int, *, task: str | None) -> Tensor:
    """Pooled features `[examples, hidden]` on the CPU, under a finished task or of the base model alone."""
    batches = examples.batches(batch_size, model.device)
    return torch.cat([model.features(batch, task=task).cpu() for batch in batches])
