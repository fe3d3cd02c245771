"""The baseline: a linear probe on the features of the frozen model."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

C_VALUES = tuple(float(strength) for strength in np.logspace(-4, 3, 15))


def linear_probe(train: Any, validation: Any, test: Any) -> dict[str, float]:
    """Fit a logistic regression on features; the validation split chooses its regularisation.

    Args:
        train, validation, test: pairs of features `[n, F]` and labels `[n]`.

    Returns:
        `accuracy` on the test split, and `C`, the inverse strength of the chosen regularisation.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    best, best_score = None, -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in C_VALUES:
            probe = LogisticRegression(C=strength, max_iter=300).fit(*train)
            score = probe.score(*validation)
            if score > best_score:
                best, best_score = probe, score
    assert best is not None
    return {"accuracy": float(best.score(*test)), "C": float(best.C)}
