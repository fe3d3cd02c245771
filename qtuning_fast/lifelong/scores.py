"""How well a task is answered: each problem type has one measure, the usual one of its field.

- `accuracy`, for one class an example: the share of examples whose most probable class is right.
- `micro_f1`, for several labels: F1 over all pairs of an example and a label. The model gives a label if its
  probability is above one half.
- `pearson`, for a number: Pearson's correlation of the predicted numbers with the true ones, from -1 to 1, as in GLUE.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE

METRICS = {SINGLE: "accuracy", MULTI: "micro_f1", REGRESSION: "pearson"}
WORDS = {"accuracy": "accuracy", "micro_f1": "micro-F1", "pearson": "correlation"}


def score(problem_type: str, outputs: Any, labels: Any) -> float:
    """Return the measure of a problem type.

    Args:
        problem_type: one of `METRICS`.
        outputs: logits `[n, classes]`, or the predicted numbers `[n, 1]`.
        labels: class indices `[n]`, 0 or 1 for each class `[n, classes]`, or numbers `[n]`.
    """
    outputs, labels = np.asarray(outputs), np.asarray(labels)
    if problem_type == SINGLE:
        return float(np.mean(outputs.argmax(-1) == labels))
    if problem_type == MULTI:
        return micro_f1(outputs > 0, labels > 0)
    return pearson(outputs[:, 0], labels)


def micro_f1(given: np.ndarray, right: np.ndarray) -> float:
    """Return F1 over all entries of two boolean arrays; 1 where no label is given and none is right."""
    wrong = int((given != right).sum())
    both = 2 * int((given & right).sum())
    return both / (both + wrong) if both + wrong else 1.0


def pearson(predicted: np.ndarray, right: np.ndarray) -> float:
    """Return Pearson's correlation; 0 where either side is constant, which says nothing about the other."""
    x, y = (np.asarray(each, dtype=np.float64) for each in (predicted, right))
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float(np.clip((x * y).sum() / size, -1, 1)) if size > 0 else 0.0
