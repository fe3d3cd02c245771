"""Evaluate a model on examples: outputs, probabilities, scores and features.

Several processes take the batches in turn and gather what they find. The batches are those of one process, so the
numbers are its numbers, to the bit; and evaluation takes a good part of a run, so each process its share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtuning_fast.lifelong.data.encoded import EncodedExamples, in_order
from qtuning_fast.lifelong.scores import score
from qtuning_fast.method.labels import MULTI, SINGLE
from qtuning_fast.model.distributed import dealt_in_turn
from qtuning_fast.model.model import QTuningModel
from qtuning_fast.model.scoring import Answers, answer_scores


@torch.no_grad()
def outputs(model: QTuningModel, examples: EncodedExamples, batch_size: int, answers: Answers | None = None) -> Tensor:
    """What the head of the current task gives, `[examples, outputs]` on the CPU; of a language model, answers' scores.

    Args:
        answers: the answers of a language model, one per class.
    """
    examples, places = examples.by_length()

    def found(number: int) -> Tensor:
        batch = examples.batch(number, batch_size, model.device)
        outputs = model(**batch).logits if answers is None else answer_scores(model, batch, answers)
        return outputs.float().cpu()

    with model.evaluating():
        return in_order(torch.cat(dealt_in_turn(examples.batch_count(batch_size), found)), places)


def probabilities(
    model: QTuningModel,
    examples: EncodedExamples,
    batch_size: int,
    answers: Answers | None = None,
    problem_type: str = SINGLE,
) -> Tensor:
    """Probabilities of the classes under the current task, `[examples, classes]` on the CPU; see `outputs`.

    They sum to one if each example has one class; a language model's answers are scaled so. With several labels, each
    has a probability of its own. Regression has no probabilities: these are the predicted numbers, `[examples, 1]`.
    """
    found = outputs(model, examples, batch_size, answers)
    return found.softmax(-1) if problem_type == SINGLE else found.sigmoid() if problem_type == MULTI else found


def task_score(
    model: QTuningModel,
    examples: EncodedExamples,
    batch_size: int,
    answers: Answers | None = None,
    problem_type: str = SINGLE,
) -> float:
    """How well the model answers the current task, by the measure of its problem type; see `outputs`."""
    found = outputs(model, examples, batch_size, answers)
    return score(problem_type, found, examples.columns["labels"])


def features(model: QTuningModel, examples: EncodedExamples, batch_size: int, *, task: str | None) -> Tensor:
    """Pooled features `[examples, hidden]` on the CPU, under a finished task; None means the base model alone."""
    examples, places = examples.by_length()

    def found(number: int) -> Tensor:
        return model.features(examples.batch(number, batch_size, model.device), task=task).cpu()

    return in_order(torch.cat(dealt_in_turn(examples.batch_count(batch_size), found)), places)
