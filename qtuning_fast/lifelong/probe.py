"""The baseline: a linear probe on the features of the frozen model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from qtuning_fast.lifelong.scores import METRICS, score
from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE

C_VALUES = tuple(float(strength) for strength in np.logspace(-4, 3, 15))

Predict = Callable[[np.ndarray], np.ndarray]
"""Maps features `[n, F]` to outputs `[n, outputs]`."""


def linear_probe(train: Any, validation: Any, test: Any, problem_type: str = SINGLE) -> dict[str, float]:
    """Fit a linear model on features; the validation split chooses its regularisation.

    It is a logistic regression, one a label if an example may have several, or a ridge regression for numbers.

    Args:
        train, validation, test: pairs of features `[n, F]` and labels, as `score` takes them.
        problem_type: what the labels mean.

    Returns:
        The measure of the problem type on the test split, by its name, and `C`, the inverse strength of the chosen
        regularisation.
    """
    from sklearn.exceptions import ConvergenceWarning

    fit = {SINGLE: _classes, MULTI: _label_by_label, REGRESSION: _numbers}[problem_type]
    best: tuple[Predict, float] | None = None
    best_score = -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in C_VALUES:
            predict = fit(strength, *train)
            found = score(problem_type, predict(validation[0]), validation[1])
            if found > best_score:
                best, best_score = (predict, strength), found
    assert best is not None
    predict, strength = best
    return {METRICS[problem_type]: score(problem_type, predict(test[0]), test[1]), "C": strength}


def _classes(strength: float, features: np.ndarray, labels: np.ndarray) -> Predict:
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=strength, max_iter=300).fit(features, labels)
    index = np.eye(int(max(probe.classes_)) + 1)
    return lambda x: index[probe.predict(x)]


def _label_by_label(strength: float, features: np.ndarray, labels: np.ndarray) -> Predict:
    from sklearn.linear_model import LogisticRegression

    def decide(column: np.ndarray) -> Predict:
        if (column == column[0]).all():  # the training split has nothing to tell it from
            return lambda x: np.full(len(x), 2.0 * column[0] - 1)
        return LogisticRegression(C=strength, max_iter=300).fit(features, column).decision_function

    deciding = [decide(column) for column in labels.T]
    return lambda x: np.stack([each(x) for each in deciding], axis=1)


def _numbers(strength: float, features: np.ndarray, labels: np.ndarray) -> Predict:
    from sklearn.linear_model import Ridge

    ridge = Ridge(alpha=1 / strength).fit(features, labels)
    return lambda x: ridge.predict(x)[:, None]
