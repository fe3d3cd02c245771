"""How well examples are answered whose task nobody names, among all classes learned so far.

An answer is right if both its task and its class are. A task whose answers are not one class of several counts as one
class: an answer is right if the task is. `UnnamedTasks` puts these measures together for `metrics.json`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtuning_fast.lifelong.metrics import evaluation_summary

Pairs = NDArray[np.int64]
"""The place of a task and a class of it for each example, `[n, 2]`."""

JOINT_EXAMPLES = 100, 10_000
"""Training examples of the joint regression: a class at most, and in all."""

_BINS = 10
_JOINT_C = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def found(answers: Sequence[Pairs], truths: Sequence[Pairs]) -> dict[str, list[float]]:
    """Return the share of right answers and of right tasks, for the test examples of each task.

    Args:
        answers, truths: for each task what its examples are taken for, and what they are.
    """
    return {
        "accuracy": [float((a == t).all(1).mean()) for a, t in zip(answers, truths)],
        "task_found": [float((a[:, 0] == t[:, 0]).mean()) for a, t in zip(answers, truths)],
    }


def label_accuracy(answers: Sequence[Pairs], truths: Sequence[Pairs], names: Sequence[Sequence[object]]) -> float:
    """Return the share of answers with the right label name, whatever the task; the mean over tasks.

    Args:
        names: the label names of each task; for a task that counts as one class, something else that tells it apart.
    """

    def labels(pairs: Pairs) -> list[object]:
        return [names[task][label] for task, label in pairs]

    return float(np.mean([np.mean([x == y for x, y in zip(labels(a), labels(t))]) for a, t in zip(answers, truths)]))


def confusion(answers: Sequence[Pairs], tasks: int) -> list[list[float]]:
    """Return for the test examples of each task the share that is taken for each task, `[T][T]`."""
    return [(np.bincount(pairs[:, 0], minlength=tasks) / len(pairs)).tolist() for pairs in answers]


def reliability(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> dict[str, Any]:
    """Compare probabilities with how often they are right (Guo et al. 2017, arXiv 1706.04599).

    Returns:
        `error`, the expected calibration error; `bins`, for each of ten equal ones with examples the mean probability,
        the share that is right, and the number of examples.
    """
    number = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    parts = [number == each for each in range(_BINS)]
    bins = [[float(confidence[p].mean()), float(right[p].mean()), int(p.sum())] for p in parts if p.any()]
    error = sum(abs(mean - share) * count for mean, share, count in bins) / len(confidence)
    return {"error": float(error), "bins": bins}


def auroc(of_no_task: NDArray[np.float64], of_a_task: NDArray[np.float64]) -> float:
    """Return how well distances tell examples of no known task from others: the area under the ROC curve."""
    from sklearn.metrics import roc_auc_score

    truth = np.r_[np.ones(len(of_no_task)), np.zeros(len(of_a_task))]
    return float(roc_auc_score(truth, np.r_[of_no_task, of_a_task]))


def joint_examples(classes: int) -> int:
    """Return how many examples of each class the joint regression learns from, at most."""
    each, in_all = JOINT_EXAMPLES
    return max(1, min(each, in_all // classes))


def joint_regression(train: tuple[Any, Pairs], validation: tuple[Any, Pairs], tests: Sequence[Any]) -> list[Pairs]:
    """Return the answers of a logistic regression that learns from examples of all tasks at once.

    Lifelong learning is not allowed to: it is an upper mark. The validation examples choose its regularisation.

    Args:
        train, validation: features `[n, F]` of all tasks' examples, and what they are.
        tests: features of each task's test examples.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classes, labels = np.unique(train[1], axis=0, return_inverse=True)
    labels = labels.reshape(-1)
    if len(classes) == 1:
        return [np.repeat(classes, len(test), axis=0) for test in tests]
    best, best_share = None, -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in _JOINT_C:
            fitted = LogisticRegression(C=strength, max_iter=200).fit(train[0], labels)
            share = float((classes[fitted.predict(validation[0])] == validation[1]).all(1).mean())
            if share > best_share:
                best, best_share = fitted, share
    assert best is not None
    return [classes[best.predict(test)] for test in tests]


def first_of_each_class(labels: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return the places of the first examples of each class, in order."""
    places = [np.flatnonzero(labels == each)[:most] for each in np.unique(labels)]
    return np.sort(np.concatenate(places))


def evaluation(stages: Sequence[dict[str, list[float]]], label_share: float) -> dict[str, Any]:
    """Summarise what was found after each task.

    Args:
        stages: the result of `found` after each of T tasks.
        label_share: the result of `label_accuracy` after the last.
    """
    tasks = len(stages)
    padded = {
        name: [[*stage[name], *[None] * (tasks - len(stage[name]))] for stage in stages]
        for name in ("accuracy", "task_found")
    }
    summary = evaluation_summary(padded["accuracy"])
    return {
        "accuracy_matrix": summary["accuracy_matrix"],
        "average_accuracy": summary["average_accuracy"],
        "cumulative_average_accuracy": float(np.mean([np.mean(stage["accuracy"]) for stage in stages])),
        "forgetting": summary["forgetting"],
        "task_found": float(np.mean(stages[-1]["task_found"])),
        "task_found_matrix": padded["task_found"],
        "label_accuracy": label_share,
    }
