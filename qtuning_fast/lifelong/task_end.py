"""End a task of a run: what its examples say in closed form joins the head that training has left."""

from __future__ import annotations

import torch

from qtuning_fast.lifelong.class_incremental import first_of_each_class
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.evaluation import features
from qtuning_fast.method.closed_form import LabelledFeatures, LinearHead, mixed_head
from qtuning_fast.model.distributed import from_first
from qtuning_fast.model.model import QTuningModel

MOST_EXAMPLES = 1024
"""Of a class and split; of more, training has learned all there is."""


@torch.no_grad()
def mix_head(model: QTuningModel, train: EncodedExamples, validation: EncodedExamples, batch_size: int) -> None:
    """Mix the head in training, of classes, with the closed form of all examples under the trained prompt.

    Args:
        model: a model with a task in training whose examples have one class each.
        train, validation: the encoded splits.
        batch_size: of the passes.
    """
    learning = model.learning
    assert learning.task is not None and learning.head is not None
    trained = LinearHead(*(part.detach().double().cpu() for part in (learning.head.weight, learning.head.bias)))
    model.set_task(learning.task)  # a step has changed the prompt that is placed
    seen = [_described(model, split, batch_size) for split in (train, validation)]
    learning.set_head(from_first(lambda: mixed_head(trained, seen[0], seen[1], len(learning.label_names))))


def _described(model: QTuningModel, examples: EncodedExamples, batch_size: int) -> LabelledFeatures:
    some = examples.subset(first_of_each_class(examples.columns["labels"].numpy(), MOST_EXAMPLES).tolist())
    return LabelledFeatures(features(model, some, batch_size, task=model.learning.task), some.columns["labels"])
