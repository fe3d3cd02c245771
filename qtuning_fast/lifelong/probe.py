"""The linear probe on the features of the frozen model: the baseline, and the head of the method `probe`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qtuning_fast.lifelong.scores import score
from qtuning_fast.method.closed_form import LinearHead
from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE

C_VALUES = tuple(float(strength) for strength in np.logspace(-4, 3, 15))

_NEVER = -1e4  # the logit of a class that no training example has


@dataclass(frozen=True)
class LinearProbe:
    """A tuned linear model of features.

    Attributes:
        head: the linear map.
        C: inverse strength of the regularisation.
    """

    head: LinearHead
    C: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Map features `[n, F]` to outputs `[n, outputs]`: logits of classes or of labels, or numbers."""
        return self.head(torch.from_numpy(features)).numpy()


def tuned_probe(train: Any, validation: Any, problem_type: str, outputs: int) -> LinearProbe:
    """Fit a linear model on features, with the regularisation that does best on the validation split.

    It is a logistic regression, one a label if an example may have several, or a ridge regression for numbers. If
    several regularisations do equally well, the strongest is taken.

    Args:
        train, validation: pairs of features `[n, F]` and labels, as `score` takes them.
        problem_type: what the labels mean.
        outputs: the number of classes, of labels, or of numbers.
    """
    from sklearn.exceptions import ConvergenceWarning

    fit = {SINGLE: _classes, MULTI: _label_by_label, REGRESSION: _numbers}[problem_type]
    features, labels = train
    best, best_score = None, -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in C_VALUES:
            weight, bias = (torch.from_numpy(part).double() for part in fit(strength, features, labels, outputs))
            probe = LinearProbe(LinearHead(weight, bias), strength)
            found = score(problem_type, probe(validation[0]), validation[1])
            if found > best_score:
                best, best_score = probe, found
    assert best is not None
    return best


Fitted = tuple[np.ndarray, np.ndarray]
"""Weight `[outputs, F]` and bias `[outputs]` of a linear map."""


def _classes(strength: float, features: np.ndarray, labels: np.ndarray, outputs: int) -> Fitted:
    from sklearn.linear_model import LogisticRegression

    weight, bias = np.zeros((outputs, features.shape[1])), np.full(outputs, _NEVER)
    present = np.unique(labels)
    if len(present) == 1:
        bias[present] = 0
        return weight, bias
    fitted = LogisticRegression(C=strength, max_iter=300).fit(features, labels)
    if len(present) == 2:  # one row then stands for both classes
        weight[present] = np.concatenate([-fitted.coef_, fitted.coef_]) / 2
        bias[present] = np.concatenate([-fitted.intercept_, fitted.intercept_]) / 2
    else:
        weight[present], bias[present] = fitted.coef_, fitted.intercept_
    return weight, bias


def _label_by_label(strength: float, features: np.ndarray, labels: np.ndarray, outputs: int) -> Fitted:
    from sklearn.linear_model import LogisticRegression

    weight, bias = np.zeros((outputs, features.shape[1])), np.zeros(outputs)
    for place, column in enumerate(labels.T):
        if (column == column[0]).all():  # the training split has nothing to tell it from
            bias[place] = 2.0 * column[0] - 1
        else:
            fitted = LogisticRegression(C=strength, max_iter=300).fit(features, column)
            weight[place], bias[place] = fitted.coef_[0], fitted.intercept_[0]
    return weight, bias


def _numbers(strength: float, features: np.ndarray, labels: np.ndarray, outputs: int) -> Fitted:
    from sklearn.linear_model import Ridge

    fitted = Ridge(alpha=1 / strength).fit(features, labels.reshape(-1, outputs))
    return np.reshape(fitted.coef_, (outputs, -1)), np.reshape(fitted.intercept_, outputs)
