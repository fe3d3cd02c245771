"""Probabilities, accuracy and features of a model's answers."""

from __future__ import annotations

import pytest
import torch
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.evaluation import features, outputs, probabilities, task_score
from qtuning_fast.method.labels import MULTI, REGRESSION


@pytest.fixture
def model(tiny_bert: BertModel) -> QTuningModel:
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=2, shared_length=2))
    model.start_task("mine", label_names=["a", "b", "c"])
    model.finish_task()
    model.set_task("mine")
    return model


@pytest.fixture
def examples(batch: dict[str, torch.Tensor]) -> EncodedExamples:
    return EncodedExamples(batch | {"labels": torch.zeros(4, dtype=torch.long)})


def test_probabilities_do_not_depend_on_the_batch_size(model: QTuningModel, examples: EncodedExamples) -> None:
    at_once, in_parts = (probabilities(model, examples, size) for size in (4, 3))
    assert at_once.shape == (4, 3) and at_once.sum(1).tolist() == pytest.approx([1] * 4)
    torch.testing.assert_close(at_once, in_parts)
    assert not at_once.requires_grad


def test_accuracy_is_the_share_of_right_answers(model: QTuningModel, examples: EncodedExamples) -> None:
    chosen = probabilities(model, examples, 4).argmax(1)
    labels = chosen.clone()
    labels[0] = (labels[0] + 1) % 3
    assert task_score(model, examples.with_column("labels", chosen), 2) == 1
    assert task_score(model, examples.with_column("labels", labels), 2) == 0.75


def test_features_are_of_the_base_model_or_of_a_task(model: QTuningModel, examples: EncodedExamples) -> None:
    alone, under_task = (features(model, examples, 3, task=task) for task in (None, "mine"))
    assert alone.shape == under_task.shape == (4, 32)
    assert not torch.allclose(alone, under_task)


def test_each_problem_type_has_its_probabilities_and_score(tiny_bert: BertModel, examples: EncodedExamples) -> None:
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=2, shared_length=2))
    for name, problem_type, classes in (("topics", MULTI, 3), ("stars", REGRESSION, 1)):
        model.start_task(name, classes, problem_type=problem_type)
        model.finish_task()
    model.set_task("topics")
    logits = outputs(model, examples, 3)
    torch.testing.assert_close(probabilities(model, examples, 4, problem_type=MULTI), logits.sigmoid())
    right = examples.with_column("labels", (logits > 0).long())
    assert task_score(model, right, 2, problem_type=MULTI) == 1
    model.set_task("stars")
    numbers = outputs(model, examples, 3)
    assert numbers.shape == (4, 1) and torch.equal(probabilities(model, examples, 3, problem_type=REGRESSION), numbers)
    scaled = examples.with_column("labels", 2 - 5 * numbers[:, 0])
    assert task_score(model, scaled, 2, problem_type=REGRESSION) == pytest.approx(-1)
