"""What is timed does infer tasks, each fit is a new one, and sizes are counted before they are measured."""

import json
from types import SimpleNamespace

import pytest
import torch

from qtuning_fast.bench.rows import task_inference
from qtuning_fast.bench.rows.roofline import Ceilings
from qtuning_fast.bench.rows.task_inference import FEW, Tasks, bytes_of, predicted

SIZE = 40
CEILINGS = Ceilings(flops=1e9, copied=1e9, read=1e9, special=0.0)


def new_tasks():
    backbone = SimpleNamespace(hidden_size=SIZE, device=torch.device("cpu"))
    return Tasks(SimpleNamespace(hidden_size=SIZE, backbone=backbone))


@pytest.fixture
def tasks():
    return new_tasks()


def test_each_fit_is_a_new_one_of_all_tasks(tasks):
    tasks.learn(3)
    first = tasks.fit()
    assert tasks.known.fitted() is first and tasks.fit() is not first
    tasks.learn(5)
    assert tasks.fit().order == tuple(f"task-{number}" for number in range(5))


def test_tasks_are_found_where_they_lie_apart_and_not_where_they_are_one(tasks, monkeypatch):
    monkeypatch.setattr(task_inference, "APART", 2.0)
    tasks.learn(4)
    assert tasks.found(tasks.fit()) > 0.95
    monkeypatch.setattr(task_inference, "APART", 0.0)
    alike = new_tasks()
    alike.learn(4)
    assert alike.found(alike.fit()) < 0.5


@pytest.mark.parametrize("count", [2, 7])
def test_bytes_are_predicted_exactly(tasks, count):
    tasks.learn(count)
    said = predicted(count, SIZE, CEILINGS, CEILINGS)
    assert said.statistics_bytes == tasks.known.statistics.bytes_in_memory and said.rule_bytes == bytes_of(tasks.fit())


def test_the_work_grows_with_the_number_of_tasks():
    few, many = (predicted(count, 384, CEILINGS, CEILINGS) for count in (1000, 2000))
    assert 1.9 < many.fit_seconds / few.fit_seconds < 2.1 and 1.9 < many.score_ms / few.score_ms < 2.1
    product = 2 * 16 * 384 * (8000 + 384) / 1e9
    read = 8 * (8000 * 385 + 384**2) / 1e9
    assert many.score_ms == pytest.approx(1e3 * max(product, read))


def test_a_run_ends_in_a_file_and_a_table(tmp_path, capsys):
    out = tmp_path / "task_inference.json"
    assert task_inference.main(["--dry-run", "--out", str(out)]) == 0
    [entry] = json.loads(out.read_text())["entries"].values()
    assert list(entry["rows"]) == [str(count) for count in FEW] and entry["passes_to_record"] == 8
    for row in entry["rows"].values():
        assert row["fit_seconds"]["median"] > 0 and row["ms"]["score"]["median"] > 0 and 0 <= row["task_found"] <= 1
        assert row["statistics_bytes"] == row["predicted"]["statistics_bytes"]
    text = capsys.readouterr().out
    assert "to record a task" in text and max(map(len, text.splitlines())) <= 120
