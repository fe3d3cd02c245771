"""Whether cost stays flat is told from the figures alone, and the figures are of what they claim to be."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtuning_fast import QTuningModel
from qtuning_fast.bench.memory import STATUS
from qtuning_fast.bench.rows import lifelong
from qtuning_fast.bench.rows.lifelong import DRY, METHODS, Stream, TaskFigures, table, verdict, windows
from qtuning_fast.model.checkpoint import read_checkpoint

ONE = TaskFigures(
    task=1,
    prefix_rows=60,
    step_ms=100.0,
    anchor_ms=50.0,
    step_over_anchor=2.0,
    with_start_ms=110.0,
    between_seconds=0.25,
    adapter_bytes=1000,
    adapters_in_memory_bytes=0,
    resident_bytes=10_000,
    device_bytes=None,
    device_peak_bytes=None,
)


def figures(tasks: int, **last_ten: float) -> list[TaskFigures]:
    """The same for every task, but for the last ten."""
    per_task = [replace(ONE, task=number) for number in range(1, tasks + 1)]
    return per_task[:-10] + [replace(each, **last_ten) for each in per_task[-10:]]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The file and what is printed."""
    out, printed = tmp_path_factory.mktemp("bench") / "new" / "lifelong.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert lifelong.main(["--dry-run", "--out", str(out)]) == 0
    return json.loads(out.read_text()), printed.getvalue()


@pytest.mark.thorough
def test_a_dry_run_ends_in_a_file_and_a_table(dry_run: tuple[dict, str]) -> None:
    document, text = dry_run
    assert document["question"] == "lifelong" and document["sizes"]["tasks"] == 7 and document["sizes"]["hidden"] == 32
    assert list(document["entries"]) == ["queue", "accumulate"] and not document["errors"]
    for entry in document["entries"].values():
        assert [each["task"] for each in entry["per_task"]] == list(range(1, 8))
        assert all(each["step_ms"] > 0 and each["anchor_ms"] > 0 for each in entry["per_task"])
        assert all((each["resident_bytes"] or 0) > 1 << 20 for each in entry["per_task"]) or not STATUS.exists()
        assert entry["verdict"] is None and entry["seconds"] > 0 and "queue_size" in entry["config"]
    assert "too few tasks" in text and max(map(len, text.splitlines())) <= 120


@pytest.mark.thorough
def test_the_queue_is_bounded_and_what_accumulates_grows_by_a_prompt(dry_run: tuple[dict, str]) -> None:
    entries = dry_run[0]["entries"]
    rows = {name: [each["prefix_rows"] for each in entry["per_task"]] for name, entry in entries.items()}
    assert rows["queue"] == [20, 30, 40, 50, 60, 60, 60]
    assert rows["accumulate"] == [10, 20, 30, 40, 50, 60, 70]
    sizes = {name: [each["adapter_bytes"] for each in entry["per_task"]] for name, entry in entries.items()}
    assert len(set(sizes["queue"][4:])) == 1
    steps = [after - before for before, after in zip(sizes["accumulate"], sizes["accumulate"][1:])]
    assert set(steps) == {10 * DRY.layers * 2 * DRY.hidden * 4}


def test_finished_adapters_lie_on_disk_only(tmp_path: Path) -> None:
    stream = Stream(METHODS["queue"], DRY, 3, "cpu", tmp_path)
    assert [stream.next_task().adapters_in_memory_bytes for _ in range(3)] == [0, 0, 0]
    assert all(entry.value is None for entry in stream.model.adapters.entries())
    saved = read_checkpoint(tmp_path).adapters
    assert list(saved) == stream.model.tasks == ["task-1", "task-2", "task-3"]
    assert saved["task-3"].prefix_rows == 40


def test_what_accumulates_keeps_its_newest_adapter(tmp_path: Path) -> None:
    stream = Stream(METHODS["accumulate"], DRY, 3, "cpu", tmp_path)
    held = [stream.next_task() for _ in range(3)]
    assert [each.adapters_in_memory_bytes for each in held] == [each.adapter_bytes for each in held]
    assert [each.prefix_rows for each in held] == [10, 20, 30]
    assert stream.model.tasks == ["task-3"] and not list(tmp_path.iterdir())


def test_retention_is_in_the_step_and_its_features_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_against, losses = [], []
    features, forward = QTuningModel.features, QTuningModel.forward

    def noted_features(model: QTuningModel, inputs: dict, *, task: str) -> torch.Tensor:
        if task not in (None, model.learning.task):  # not for choosing where the task starts
            held_against.append(task)
        return features(model, inputs, task=task)

    def noted_forward(model: QTuningModel, *arguments: object, **inputs: object) -> object:
        output = forward(model, *arguments, **inputs)
        if inputs.get("labels") is not None:
            losses.append(output.retention_loss is not None)
        return output

    monkeypatch.setattr(QTuningModel, "features", noted_features)
    monkeypatch.setattr(QTuningModel, "forward", noted_forward)
    stream = Stream(METHODS["queue"], DRY, 3, "cpu", tmp_path)
    for _ in range(7):
        stream.next_task()
    assert held_against == ["task-5", "task-6"]
    assert losses == [False] * 5 * 3 + [True] * 2 * 3


def test_what_is_learned_is_the_task_and_the_anchor_has_no_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = []
    forward = QTuningModel.forward

    def noted(model: QTuningModel, *arguments: object, **inputs: object) -> object:
        tasks.append(model.active_task)
        return forward(model, *arguments, **inputs)

    monkeypatch.setattr(QTuningModel, "forward", noted)
    stream = Stream(METHODS["queue"], DRY, 3, "cpu", tmp_path)
    before = stream.model.training_prefix.rows[0].shared.clone()
    stream.next_task()
    assert tasks == ["task-1", None] * 3
    assert not torch.equal(stream.model.training_prefix.rows[0].shared, before)


def test_flat_is_what_stays_within_its_limit() -> None:
    found = verdict(figures(30, step_ms=104.0, resident_bytes=10_300, anchor_ms=75.0))
    assert found["ratios"] == pytest.approx(
        {
            "step_ms": 1.04,
            "step_over_anchor": 1.0,
            "with_start_ms": 1.0,
            "resident_bytes": 1.03,
            "adapter_bytes": 1.0,
            "anchor_ms": 1.5,
            "between_seconds": 1.0,
            "prefix_rows": 1.0,
        }
    )
    assert found["flat"] == {
        "step_ms": True,
        "step_over_anchor": True,
        "with_start_ms": True,
        "resident_bytes": False,
        "adapter_bytes": True,
    }
    for grown in ({"step_ms": 106.0}, {"step_over_anchor": 2.2}, {"with_start_ms": 116.0}, {"adapter_bytes": 1021}):
        assert [name for name, flat in verdict(figures(30, **grown))["flat"].items() if not flat] == list(grown)


def test_what_the_verdict_is_taken_from() -> None:
    per_task = figures(40)
    for number in (0, 4, 15, 29):  # before, between and behind the two windows' ends
        per_task[number] = replace(per_task[number], step_ms=1e6)
    per_task[7] = per_task[33] = replace(per_task[33], step_ms=1e6)  # one in ten moves no median
    assert verdict(per_task)["ratios"]["step_ms"] == 1
    assert verdict(figures(25)) is not None and verdict(figures(24)) is None
    doubled = [replace(each, step_ms=200.0) if 5 <= number < 15 else each for number, each in enumerate(figures(25))]
    assert verdict(doubled)["ratios"]["step_ms"] == 0.5


def test_a_table_of_all_there_is_to_know() -> None:
    on_gpu = {"device_bytes": 90_000 << 20, "device_peak_bytes": 90_000 << 20, "resident_bytes": 123_456 << 20}
    per_task = [replace(each, **on_gpu) for each in figures(200, step_ms=110.0, adapter_bytes=1000 << 20)]
    lines = table("queue", per_task).splitlines()
    assert max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines[2:-2]] == ["1", "6-15", "41-50", "91-100", "141-150", "191-200"]
    assert "1.100" in lines[-2] and lines[-1].split() == ["grows", "flat", "flat", "grows", "flat", "flat", "flat"]
    assert [len(window) for window in windows(per_task)] == [1, 10, 10, 10, 10, 10]


def test_steps_that_leave_nothing_to_count_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        lifelong.main(["--dry-run", "--steps", "2", "--out", str(tmp_path / "x.json")])
    assert "--steps is 2" in capsys.readouterr().err and not list(tmp_path.iterdir())
