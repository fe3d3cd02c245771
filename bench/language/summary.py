"""Figures of the study of language models from its files."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median
from typing import Any

from qtuning_fast.model.checked_files import read_json

Record = dict[str, Any]
"""The content of a run's file."""

Found = dict[str, dict[str, dict[int, Record]]]
"""The runs by model, arm and draw."""


def read(folder: Path) -> Found:
    """Read the runs' files.

    Raises:
        ValueError: two runs of what the study calls one model were of two.
    """
    found: Found = {}
    for file in sorted(folder.glob("*/*/*.json")):
        record = read_json(file)
        found.setdefault(record["model"], {}).setdefault(record["arm"], {})[record["draw"]] = record
    for name, arms in found.items():
        models = {record["fingerprint"] for draws in arms.values() for record in draws.values()}
        if len(models) > 1:
            raise ValueError(f"the runs in {folder / name} are of {len(models)} models; keep those of one")
    return found


def means(draws: dict[int, Record]) -> dict[int, float]:
    """Return the mean accuracy over the tasks, by draw."""
    return {draw: fmean(task["accuracy"] for task in record["per_task"]) for draw, record in draws.items()}


def by_task(draws: dict[int, Record]) -> dict[str, float]:
    """Return the mean accuracy over the draws, by task."""
    accuracies: dict[str, list[float]] = {}
    for record in draws.values():
        for task in record["per_task"]:
            accuracies.setdefault(task["name"], []).append(task["accuracy"])
    return {name: fmean(values) for name, values in accuracies.items()}


def of_a_task(draws: dict[int, Record], measure: str) -> float | None:
    """Return the median of a measure over tasks and draws; None where none has it."""
    values = [task[measure] for record in draws.values() for task in record["per_task"] if task[measure] is not None]
    return median(values) if values else None
