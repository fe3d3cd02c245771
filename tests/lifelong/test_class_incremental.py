"""Shares of right answers, confusion, calibration, and the marks beside them."""

from __future__ import annotations

import numpy as np
import pytest

from qtuning_fast.lifelong.class_incremental import (
    auroc,
    confusion,
    evaluation,
    first_of_each_class,
    found,
    joint_regression,
    label_accuracy,
    reliability,
)

TRUTHS = [np.array([[0, 0], [0, 1], [0, 1], [0, 0]]), np.array([[1, 0], [1, 2]])]
ANSWERS = [np.array([[0, 0], [0, 0], [1, 1], [0, 0]]), np.array([[1, 0], [0, 1]])]
NAMES = [("bad", "good"), ("red", "good", "blue")]


def test_an_answer_is_right_if_task_and_class_are() -> None:
    assert found(ANSWERS, TRUTHS) == {"accuracy": [0.5, 0.5], "task_found": [0.75, 0.5]}


def test_by_label_name_the_task_does_not_matter() -> None:
    # "good" of the second task for "good" of the first is right; "good" for "blue" is not
    assert label_accuracy(ANSWERS, TRUTHS, NAMES) == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_rows_of_the_confusion_are_shares_of_a_task() -> None:
    assert confusion(ANSWERS, 3) == [[0.75, 0.25, 0.0], [0.5, 0.5, 0.0]]


def test_reliability_against_a_definition_in_a_loop() -> None:
    rng = np.random.default_rng(0)
    confidence, right = rng.uniform(0, 1, 300), rng.uniform(0, 1, 300) < 0.6
    confidence[:3] = 0, 1, 0.1
    error, bins = 0.0, []
    for low in range(10):
        inside = [
            i for i in range(300) if low / 10 <= confidence[i] < (low + 1) / 10 or (low == 9 and confidence[i] == 1)
        ]
        mean, share = np.mean(confidence[inside]), np.mean(right[inside])
        bins.append([mean, share, len(inside)])
        error += abs(mean - share) * len(inside) / 300
    result = reliability(confidence, right)
    assert result["error"] == pytest.approx(error)
    np.testing.assert_allclose(result["bins"], bins)


def test_empty_bins_are_left_out_and_perfect_answers_have_no_error() -> None:
    assert reliability(np.ones(5), np.ones(5, dtype=bool)) == {"error": 0.0, "bins": [[1.0, 1.0, 5]]}


def test_auroc_is_the_chance_that_the_stranger_one_is_farther() -> None:
    strange, known = np.array([3.0, 1.0]), np.array([2.0, 0.5, 1.0])
    pairs = [(s > k) + 0.5 * (s == k) for s in strange for k in known]
    assert auroc(strange, known) == pytest.approx(np.mean(pairs))


def test_the_joint_regression_learns_all_tasks_at_once() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(0, 4, (3, 8))
    pairs = np.array([[0, 0], [0, 1], [1, 0]])

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.integers(0, 3, count)
        return means[chosen] + rng.normal(0, 1, (count, 8)), pairs[chosen]

    train, validation, test = draw(60), draw(30), draw(40)
    answers = joint_regression(train, validation, [test[0]])
    assert (answers[0] == test[1]).all(1).mean() > 0.95
    alone = np.zeros((5, 2), dtype=np.int64)
    assert (joint_regression((train[0][:5], alone), (train[0][:5], alone), [test[0]])[0] == 0).all(), "one class"


def test_first_of_each_class_in_order() -> None:
    labels = np.array([2, 0, 2, 2, 1, 0, 0])
    assert first_of_each_class(labels, 2).tolist() == [0, 1, 2, 4, 5]


def test_evaluation_has_the_measures_of_the_field() -> None:
    stages = [
        {"accuracy": [1.0], "task_found": [1.0]},
        {"accuracy": [0.8, 0.5], "task_found": [0.9, 0.7]},
        {"accuracy": [0.6, 0.7, 0.2], "task_found": [0.8, 0.8, 0.5]},
    ]
    summary = evaluation(stages, 0.75)
    assert summary["accuracy_matrix"] == [[1.0, None, None], [0.8, 0.5, None], [0.6, 0.7, 0.2]]
    assert summary["average_accuracy"] == pytest.approx(0.5)
    assert summary["cumulative_average_accuracy"] == pytest.approx((1 + 0.65 + 0.5) / 3)
    assert summary["forgetting"] == pytest.approx((0.4 + 0.0) / 2)
    assert summary["task_found"] == pytest.approx(0.7)
    assert summary["task_found_matrix"] == [[1.0, None, None], [0.9, 0.7, None], [0.8, 0.8, 0.5]]
    assert summary["label_accuracy"] == 0.75
