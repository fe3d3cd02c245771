"""The figures of the study are means of its files, by draw and by task."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtuning_fast.bench.language.summary import by_task, means, of_a_task, read
from qtuning_fast.model.checked_files import write_json


def write(folder: Path, arm: str, draw: int, accuracies: tuple[float, float], fingerprint: str = "x") -> None:
    measures = {"trained_parameters": 10 * draw, "step_seconds": None}
    tasks = [{"name": name, "accuracy": each, **measures} for name, each in zip(("trec", "r8"), accuracies)]
    file = folder / "flan-t5" / arm / f"{draw}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"model": "flan-t5", "arm": arm, "draw": draw, "per_task": tasks, "fingerprint": fingerprint})


def test_means(tmp_path: Path) -> None:
    write(tmp_path, "default", 1, (0.5, 0.7))
    write(tmp_path, "default", 3, (0.7, 0.9))
    write(tmp_path, "lora", 1, (0.1, 0.2))
    (tmp_path / "flan-t5" / "rates" / "lora" / "0.001").mkdir(parents=True)
    write_json(tmp_path / "flan-t5" / "rates" / "lora" / "0.001" / "sms.json", {"loss": 1.0})
    write_json(tmp_path / "flan-t5" / "rates.json", {})
    found = read(tmp_path)
    assert {name: [*arms] for name, arms in found.items()} == {"flan-t5": ["default", "lora"]}
    draws = found["flan-t5"]["default"]
    assert means(draws) == pytest.approx({1: 0.6, 3: 0.8})
    assert by_task(draws) == pytest.approx({"trec": 0.6, "r8": 0.8})
    assert of_a_task(draws, "trained_parameters") == 20 and of_a_task(draws, "step_seconds") is None


def test_runs_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path, "default", 1, (0.5, 0.7))
    write(tmp_path, "lora", 1, (0.5, 0.7), "y")
    with pytest.raises(ValueError, match="flan-t5 are of 2 models"):
        read(tmp_path)
