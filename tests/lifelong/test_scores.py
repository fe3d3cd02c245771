"""The measure of each problem type, against scikit-learn and numpy."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from qtuning_fast.lifelong.scores import METRICS, WORDS, score
from qtuning_fast.method.labels import MULTI, PROBLEM_TYPES, REGRESSION, SINGLE

RANDOM = np.random.default_rng(0)


def test_every_problem_type_has_a_measure_with_a_word() -> None:
    assert set(METRICS) == set(PROBLEM_TYPES) and set(METRICS.values()) == set(WORDS)


def test_one_class_is_scored_by_accuracy() -> None:
    logits, labels = RANDOM.normal(size=(30, 4)), RANDOM.integers(0, 4, 30)
    assert score(SINGLE, logits, labels) == pytest.approx(accuracy_score(labels, logits.argmax(1)))


def test_several_labels_are_scored_by_micro_f1() -> None:
    logits, labels = RANDOM.normal(size=(30, 4)), RANDOM.integers(0, 2, (30, 4))
    assert score(MULTI, logits, labels) == pytest.approx(f1_score(labels, logits > 0, average="micro"))
    none, all_right = (
        -np.ones((3, 2)),
        np.ones((3, 2), dtype=int),
    )  # logits that give no label; labels that are all right
    assert score(MULTI, none, 0 * all_right) == 1
    assert score(MULTI, none, all_right) == score(MULTI, -none, 0 * all_right) == 0


def test_numbers_are_scored_by_their_correlation() -> None:
    predicted, labels = RANDOM.normal(size=(30, 1)), RANDOM.normal(size=30)
    assert score(REGRESSION, predicted, labels) == pytest.approx(np.corrcoef(predicted[:, 0], labels)[0, 1])
    column = labels[:, None]
    assert score(REGRESSION, 3 * column + 2, labels) == pytest.approx(1)
    assert score(REGRESSION, -column, labels) == pytest.approx(-1)
    assert score(REGRESSION, np.ones((30, 1)), labels) == score(REGRESSION, column, np.ones(30)) == 0
