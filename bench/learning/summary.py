"""Figures of the study from its files: means, paired differences with intervals, steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from qtuning_fast.bench.learning.arms import LINEAR

Record = dict[str, Any]
"""The content of a run's file."""

CONFIDENCE = 0.95
BASE = "from-random"  # what others are compared with
SHARE = 0.95  # of the base's final accuracy on a task, to which steps are counted


@dataclass(frozen=True)
class Estimate:
    """A mean over draws, with the interval of Student's t; the interval is None of a single draw."""

    mean: float
    half_width: float | None
    draws: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        from scipy.stats import t

        if len(values) < 2:
            return cls(fmean(values), None, len(values))
        quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
        return cls(fmean(values), quantile * stdev(values) / len(values) ** 0.5, len(values))

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width


class Results:
    """All runs of one stream with one number of shots.

    Args:
        records: the content of the runs' files.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._runs: dict[str, dict[int, Record]] = {}
        for record in records:
            self._runs.setdefault(record["arm"], {})[record["draw"]] = record

    def records(self, arm: str) -> list[Record]:
        """Return the content of an arm's files, by draw."""
        return [record for _, record in sorted(self._runs.get(arm, {}).items())]

    @property
    def arms(self) -> list[str]:
        """The arms of which there are runs, without the linear classifiers."""
        return [arm for arm in self._runs if arm != LINEAR]

    def forgetting(self, arm: str) -> dict[int, float]:
        """Return the forgetting of the live queue of each draw of an arm."""
        return {each["draw"]: each["forgetting"] for each in self.records(arm)}

    def scores(self, name: str, evaluation: str = "task_adapter") -> dict[int, float]:
        """Return the mean accuracy of each draw over the tasks after the first, of an arm or a linear classifier.

        A classifier that needs an earlier task with the same classes has none where a task lacks one.
        """
        if name in self._runs:
            return {each["draw"]: fmean(each["accuracy"][evaluation][1:]) for each in self.records(name)}
        found = {each["draw"]: each["accuracy"].get(name, [None])[1:] for each in self.records(LINEAR)}
        return {draw: fmean(values) for draw, values in found.items() if values and None not in values}

    def steps(self, arm: str) -> dict[int, float]:
        """Return the mean number of steps, over the tasks after the first, to `SHARE` of what `BASE` ends with.

        A task that never reaches it counts all its steps.
        """
        base = self._runs.get(BASE, {})
        return {
            each["draw"]: fmean(map(steps_needed, each["per_task"][1:], base[each["draw"]]["per_task"][1:]))
            for each in self.records(arm)
            if each["draw"] in base
        }


def steps_needed(task: Record, base: Record) -> int:
    """Return the first step at which a task's validation score is `SHARE` of the one that `base` kept."""
    wanted = SHARE * dict(map(tuple, base["validation_curve"]))[base["best_step"]]
    curve = task["validation_curve"]
    return next((step for step, score in curve if score >= wanted), curve[-1][0])


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Estimate | None:
    """Return the mean of the differences, paired by draw; None if they share none."""
    shared = sorted(ours.keys() & theirs.keys())
    return Estimate.of([ours[draw] - theirs[draw] for draw in shared]) if shared else None


def points(estimate: Estimate | None, *, mark: bool = True) -> str:
    """A difference in points with its interval; bold if that excludes 0."""
    if estimate is None:
        return "–"
    if estimate.half_width is None:
        return f"{100 * estimate.mean:+.1f}"
    text = f"{100 * estimate.mean:+.1f} ± {100 * estimate.half_width:.1f}"
    return f"**{text}**" if mark and estimate.excludes_zero else text


def read(folder: Path) -> dict[tuple[str, int], Results]:
    """Read the results by stream and number of shots."""
    records: dict[tuple[str, int], list[Record]] = {}
    for file in sorted(folder.glob("*/*/*/*.json")):
        record = json.loads(file.read_text())
        records.setdefault((record["stream"], record["shots"]), []).append(record)
    return {key: Results(found) for key, found in sorted(records.items())}
