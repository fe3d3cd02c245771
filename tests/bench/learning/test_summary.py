"""Figures from files of runs that are made by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from qtuning_fast.bench.learning.summary import Estimate, difference, read, steps_needed


def record(arm: str, draw: int, *adapters: float, **changes: Any) -> dict[str, Any]:
    curve = [[10, 0.5], [20, 0.7], [30, 0.72]]
    task = {"best_step": 30, "validation_curve": curve, "start": None}
    accuracy = {"task_adapter": [0.9, *adapters], "live_queue": [0.5, *adapters]}
    entry = {"stream": "related", "shots": 16, "arm": arm, "draw": draw, "accuracy": accuracy}
    return entry | {"per_task": [task | {"best_step": 10}, *[task] * len(adapters)]} | changes


def write(folder: Path, *records: dict[str, Any]) -> Path:
    for each in records:
        file = folder / each["stream"] / str(each["shots"]) / each["arm"] / f"{each['draw']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(each))
    return folder


def test_an_interval_is_that_of_students_t() -> None:
    values = np.random.default_rng(0).normal(1, 2, 10)
    found = Estimate.of(values.tolist())
    low, high = ttest_1samp(values, 0).confidence_interval()
    assert found.mean - (found.half_width or 0) == pytest.approx(low)
    assert found.mean + (found.half_width or 0) == pytest.approx(high)
    assert Estimate.of([0.3]).half_width is None and not Estimate.of([0.3]).excludes_zero


def test_differences_are_paired_by_draw_and_leave_out_the_first_task(tmp_path: Path) -> None:
    linear = {
        "probe": [0.9, 0.6, 0.7],
        "closed_form": [0.9, 0.6, 0.7],
        "donor": [None, None, 0.8],
        "transferred": [None, 0.7, 0.9],
    }
    results = read(
        write(
            tmp_path,
            record("start", 0, 0.8, 0.6),
            record("start", 1, 0.9, 0.7),
            record("start", 2, 0.1, 0.1),
            record("from-random", 0, 0.7, 0.5),
            record("from-random", 1, 0.7, 0.7),
            record("linear", 0, accuracy=linear),
        )
    )["related", 16]
    assert results.arms == ["from-random", "start"]
    assert results.scores("start") == pytest.approx({0: 0.7, 1: 0.8, 2: 0.1})
    found = difference(results.scores("start"), results.scores("from-random"))
    assert found is not None and (found.mean, found.draws) == (pytest.approx(0.1), 2)
    assert results.scores("probe") == pytest.approx({0: 0.65})
    assert results.scores("donor") == {} and results.scores("transferred") == pytest.approx({0: 0.8})
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert results.steps("start") == {0: 20, 1: 20}  # paired, too


def test_steps_are_counted_to_a_share_of_what_the_base_ended_with() -> None:
    base = {"best_step": 40, "validation_curve": [[0, 0.1], [20, 0.7], [40, 0.72]]}
    curve = [[0, 0.65], [20, 0.7], [40, 0.72], [60, 0.6]]
    assert steps_needed({"validation_curve": curve}, base) == 20
    assert steps_needed({"validation_curve": [[0, 0.69], *curve[1:]]}, base) == 0
    assert steps_needed({"validation_curve": [[0, 0.5], [60, 0.6]]}, base) == 60  # never: all its steps
