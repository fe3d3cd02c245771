"""The folder of a run: what is refused, and what is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtuning_fast.lifelong.run_folder import RUN_FILE, claim_folder, locked, refuse_foreign_folder


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    refuse_foreign_folder(tmp_path / "new")
    (tmp_path / ".hidden").write_text("")
    refuse_foreign_folder(tmp_path)
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        refuse_foreign_folder(tmp_path)
    (tmp_path / RUN_FILE).write_text("{}")
    refuse_foreign_folder(tmp_path)


def test_one_process_at_a_time_and_nothing_is_left_without_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder), pytest.raises(ValueError, match="another process runs in this folder"), locked(folder):
        pytest.fail("locked twice")
    assert not folder.exists()
    with locked(folder):
        claim_folder(folder, {"seed": 1})
    assert (folder / RUN_FILE).exists()


def test_the_same_run_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    for settings in ({"about": {"stream": "a"}, "seed": 1}, {"seed": 1, "about": {"stream": "a"}}):
        claim_folder(tmp_path, settings)
    with pytest.raises(ValueError, match=r"another run \(about: stream was 'a', now 'b'; seed: was 1, now 2\)"):
        claim_folder(tmp_path, {"about": {"stream": "b"}, "seed": 2})
