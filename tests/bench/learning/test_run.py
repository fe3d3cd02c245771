"""Runs of the study, on toy tasks and a tiny model: what their files hold, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qtuning_fast.bench.learning import run as study
from qtuning_fast.bench.learning.arms import ARMS, LINEAR, Run
from qtuning_fast.bench.learning.linear import CLASSIFIERS
from qtuning_fast.bench.learning.summary import read
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.data.loading import load_task
from qtuning_fast.lifelong.trainer import LifelongTrainer


class ToyStream:
    queue_size = 2
    sources = (1, 2, 3)

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files

    def load(self, *, shots: int, seed: int) -> list[Any]:
        sizes: dict[str, Any] = {"shots": shots, "validation_shots": 4, "test_size": 8, "seed": seed}
        return [load_task(f"{name}={path}", **sizes) for name, path in list(self._files.items())[:3]]


@pytest.fixture
def toy(toy_files: dict[str, Path], tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study on toy tasks; returns the folder of its results."""
    monkeypatch.setitem(study.STUDY_STREAMS, "toys", ToyStream(toy_files))  # type: ignore[arg-type]
    monkeypatch.setattr(study, "load_base_model", lambda name: load_base_model(str(tiny_model_folder)))
    monkeypatch.setattr(study, "smaller", lambda stream, tasks: stream)
    monkeypatch.setattr(study, "WORK", tmp_path / "work")
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    assert torch.get_num_threads() == threads
    return tmp_path / "out"


@pytest.mark.parametrize("arm", ["start", "random rows in the queue", LINEAR])
def test_a_run_leaves_what_the_study_needs_and_nothing_else(toy: Path, arm: str) -> None:
    run = Run("toys", 4, arm, 1)
    study.one_run(run, toy, rehearsal=True)
    record = json.loads(study.result_file(toy, run).read_text())
    assert (record["stream"], record["shots"], record["arm"], record["draw"]) == ("toys", 4, arm, 1)
    assert len(record["tasks"]) == 3 and record["seconds"] > 0 and record["versions"]["torch"]
    results = read(toy)["toys", 4]
    if arm == LINEAR:
        assert set(record["accuracy"]) == set(CLASSIFIERS)
        assert results.scores("probe").keys() == {1}
    else:
        assert len(record["accuracy"]["task_adapter"]) == len(record["per_task"]) == 3
        assert record["config"]["training"]["steps"] == study.REHEARSAL["steps"]
        assert results.scores(arm).keys() == {1} and [task["best_step"] for task in record["per_task"]]
    assert not [path for path in (toy.parent / "work").rglob("*") if path.is_file()]


def test_random_rows_have_the_mean_and_the_spread_of_those_that_they_replace() -> None:
    rows = 3 + 2 * torch.randn(4000, 5) * torch.arange(1, 6)
    found = study.randomized(rows, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.mean(0), rows.mean(0), atol=0.5, rtol=0)
    torch.testing.assert_close(found.std(0), rows.std(0), rtol=0.05, atol=0)
    assert abs(float(torch.corrcoef(torch.stack([found[:, 0], rows[:, 0]]))[0, 1])) < 0.1


def test_with_random_rows_in_the_queue_all_else_is_as_without(toy: Path, tmp_path: Path) -> None:
    stream, starts = study.STUDY_STREAMS["toys"], []
    for arm, trainer in (("from-random", LifelongTrainer), ("random rows in the queue", study.WithRandomQueue)):
        config, training = ARMS[arm].settings(stream, 0)
        base, tokenizer = study.load_base_model("tiny")
        with trainer(
            base, tokenizer, config, stream.load(shots=4, seed=0), training, tmp_path / arm
        )._attached() as model:
            for name in ("first", "second"):
                torch.manual_seed(1)
                model.start_task(name, 2)
                model.finish_task()
            torch.manual_seed(1)
            model.start_task("third", 2)
            rows = model.training_prefix.rows[0]
            starts.append((rows.prompt.detach(), rows.old, rows.row_weights(), model.training_prefix.queue.rows[0]))
    (prompt, old, _, queue), (same, drawn, weights, kept) = starts
    assert torch.equal(prompt, same) and torch.equal(queue, kept) and torch.equal(old, queue)
    assert not torch.equal(drawn, old) and (weights == 1).all()


@pytest.mark.usefixtures("in_this_process")
def test_what_is_done_is_left_out_and_an_error_stops_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    did: list[Run] = []

    def one_run(run: Run, out: Path, rehearsal: bool) -> str:
        did.append(run)
        if run.draw == 1:
            raise RuntimeError("broken")
        return run.name

    monkeypatch.setattr(study, "one_run", one_run)
    done = study.result_file(tmp_path, Run("halves", 8, "start", 0))
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    assert study.main(["--parts", "halves", "--out", str(tmp_path)]) == 1
    assert len(did) == 39 and Run("halves", 8, "start", 0) not in did
    printed = capsys.readouterr()
    assert "1 of 40 runs are done" in printed.out and printed.err.count("RuntimeError: broken") == 4
    did.clear()
    assert study.main(["--parts", "halves", "--out", str(tmp_path), "--dry-run"]) == 0
    assert {run.draw for run in did} == {0} and len(did) == 3
    did.clear()
    study.main(["--parts", "halves", "--out", str(tmp_path), "--minutes", "1e-9"])
    assert not did
