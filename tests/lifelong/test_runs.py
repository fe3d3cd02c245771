"""Runs on disk: settings, seeds, and saved runs that are opened again."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.options import DataOptions
from qtuning_fast.lifelong.runs import RunSettings, rewrite_report, run_seeds, run_stream
from qtuning_fast.lifelong.saved_run import SavedRun


def listening(tasks: Any, title: str) -> Any:
    return nullcontext(RunListener())


def test_another_seed_draws_and_trains_anew(settings: RunSettings) -> None:
    other = settings.with_seed(7)
    assert other.data.seed == other.training.seed == 7
    assert other.with_seed(0) == settings


def test_folders_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no metrics\.json"):
        rewrite_report(tmp_path)


def test_seeds_are_folders_of_their_own_and_reported_together(settings: RunSettings, tmp_path: Path) -> None:
    summary = run_seeds(settings.with_seed(4), 2, tmp_path / "runs", listening)
    assert sorted(path.name for path in (tmp_path / "runs").glob("seed-*")) == ["seed-4", "seed-5"]
    assert len(summary["task_adapter"]["average_accuracy"]["values"]) == 2
    for report in (tmp_path / "runs").rglob("report.html"):
        report.unlink()
    page, again, is_summary = rewrite_report(tmp_path / "runs")
    assert is_summary and again == summary and page.is_file()
    assert (tmp_path / "runs" / "seed-5" / "report.html").is_file()
    assert SavedRun(tmp_path / "runs").data.seed == 4  # the first seed


def test_several_seeds_do_not_go_into_the_folder_of_one(settings: RunSettings, finished_run: Path) -> None:
    with pytest.raises(ValueError, match="one seed"):
        run_seeds(settings, 2, finished_run, listening)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(DataOptions, "load")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"out is '{tmp_path}/file/run'"):
        run_stream(settings, tmp_path / "file" / "run", listening)
