"""How well a task is answered: each problem type has one measure, the usual one of its field.

- `accuracy`, for one class an example: the share of examples whose most probable class is right.
- `micro_f1`, for several labels: F1 over all pairs of an example and a label. The model gives a label if its
  probability is above one half. If it gives none and none is right, F1 is 1.
- `pearson`, for a number: Pearson's correlation of the predicted numbers with the true ones, from -1 to 1, as in GLUE.
  If either are all the same, it is 0.
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
        from sklearn.metrics import f1_score

        return float(f1_score(labels > 0, outputs > 0, average="micro", zero_division=1.0))
    if np.ptp(outputs) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(outputs[:, 0].astype(np.float64), labels.astype(np.float64))[0, 1])
