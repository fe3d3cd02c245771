"""Runs of the study, on toy tasks and tiny models: what their files hold, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qtuning_fast.bench.language import run as study
from qtuning_fast.bench.language.arms import ARMS, DRAWS, MODELS, RATES, RateRun, Run, all_runs, arms_of, rate_runs
from qtuning_fast.bench.language.rates import rate_of
from qtuning_fast.bench.language.scores import chosen_examples
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.model.checked_files import read_json, write_json

RUNS = [(model, arm) for model in MODELS for arm in arms_of(model)]


@pytest.fixture
def toy(toy_tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study on toy tasks; returns the folder of its results."""
    monkeypatch.setattr(study, "tasks_of", lambda draw, rehearsal: toy_tasks)
    monkeypatch.setattr(study, "tuning_task", lambda name, rehearsal: toy_tasks[0])
    monkeypatch.setattr(study, "WORK", tmp_path / "work")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return tmp_path / "out"


@pytest.mark.parametrize(("model", "arm"), RUNS)
def test_a_run_leaves_what_is_compared(
    toy: Path, language_folders: dict[str, str], model: str, arm: str, toy_tasks: list[Task]
) -> None:
    run = Run(model, arm, 1)
    study.one_run(run, language_folders, toy, rehearsal=True)
    record = read_json(study.result_file(toy, run))
    assert (record["model"], record["arm"], record["draw"]) == (model, arm, 1)
    assert record["seconds"] >= 0 and record["versions"]["peft"] and record["fingerprint"]
    assert [task["name"] for task in record["per_task"]] == ["colours", "pets"]
    trains = arm not in ("zero-shot", "in-context")
    for task, given in zip(record["per_task"], toy_tasks):
        assert 0 <= task["accuracy"] <= 1 and task["accuracy"] * len(given.test) == pytest.approx(
            round(task["accuracy"] * len(given.test))
        )
        assert bool(task["trained_parameters"]) is bool(task["step_seconds"]) is trains
        assert (task["best_step"] in (0, 2)) is trains
        assert bool(task["stored_bytes"]) is (arm != "zero-shot")
    if arm == "in-context":
        shown = chosen_examples(toy_tasks[0], 1)
        words = [toy_tasks[0].answers[int(label)] for label in shown.labels]  # type: ignore[arg-type]
        assert record["per_task"][0]["stored_bytes"] == sum(map(len, [*shown.inputs, *words]))  # type: ignore[arg-type]
    assert record.get("rate") == (RATES[arm][0] if arm in RATES else None)
    assert not [path for path in (toy.parent / "work").rglob("*") if path.is_file()]


@pytest.mark.usefixtures("in_this_process")
def test_rates_are_chosen_before_they_are_used(
    toy: Path, language_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, used = {3e-4: 0.9, 1e-3: 0.5, 3e-3: 0.7}, []

    class Recorded:
        def __init__(self, *given: Any) -> None:
            self.rate = given[4]

        def validation_loss(self, task: Task) -> float:
            return losses[self.rate]

        def learn(self, task: Task, number: int) -> Any:
            used.append(self.rate)
            raise OSError("no space left")

    monkeypatch.setattr(study, "Peer", Recorded)
    folders = [f"--{name}={folder}" for name, folder in language_folders.items()]
    command = [*folders, "--out", str(toy), "--models", "flan-t5", "--arms", "lora"]
    assert study.main(command) == 1  # the runs themselves fail here
    assert rate_of(toy, "flan-t5", "lora") == 1e-3 and used == [1e-3] * DRAWS
    output = capsys.readouterr()
    assert "6 runs are left to choose rates" in output.out and "OSError: no space left" in output.err
    assert study.main(command) == 1 and "0 runs are left to choose rates" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_what_is_done_is_left_out(
    tmp_path: Path,
    language_folders: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    did: list[Run] = []
    rates: list[RateRun] = []
    monkeypatch.setattr(study, "one_run", lambda run, **more: did.append(run))
    monkeypatch.setattr(study, "one_rate", lambda run, **more: rates.append(run))
    folders = [f"--{name}={folder}" for name, folder in language_folders.items()]
    done = study.result_file(tmp_path, Run("flan-t5", "no gate", 2))
    done.parent.mkdir(parents=True)
    write_json(done, {})
    command = [*folders, "--out", str(tmp_path)]
    assert study.main([*command, "--arms", "no gate", "--models", "flan-t5"]) == 0
    assert [run.draw for run in did] == [1, 3, 4, 5] and not rates
    assert "1 of 5 runs are done" in capsys.readouterr().out
    did.clear()
    assert study.main([*command, "--dry-run"]) == 0
    assert {run.draw for run in did} == {1} and len(did) == len(RUNS)
    assert {(run.model, run.arm) for run in rates} == {(model, arm) for model in MODELS for arm in RATES}
    assert len(rates) == len(MODELS) * len(RATES) < len(rate_runs())
    did.clear()
    assert study.main([*command, "--minutes", "0"]) == 0 and not did
    assert len(all_runs()) > len(RUNS) > len(ARMS)


def test_without_a_model_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(["--flan-t5", str(tmp_path), "--models", "flan-t5"])
    assert "holds no model; `make runs/flan-t5/config.json` makes one" in capsys.readouterr().err
