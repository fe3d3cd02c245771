"""Mixed batches are timed only where they compute what the tasks compute by themselves."""

import json
from types import SimpleNamespace

import pytest
import torch

from qtuning_fast.bench.rows import mixed_tasks


def test_each_task_as_often_as_any_other():
    model = SimpleNamespace(tasks=["a", "b", "c", "d"])
    names = mixed_tasks.in_no_order(model, 12, 4)
    assert sorted(names) == sorted(["a", "b", "c", "d"] * 3) and names != sorted(names)
    assert set(mixed_tasks.in_no_order(model, 12, 2)) == {"a", "b"}


def test_a_run_ends_in_a_file_and_a_table(tmp_path, capsys):
    out = tmp_path / "new" / "mixed_tasks.json"
    assert mixed_tasks.main(["--dry-run", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["entries"]["forward"]["rows"]
    assert list(rows) == ["one-task", "named-1", "named-2", "named-4", "separate-4"]
    assert all(row["eager"]["median"] > 0 for row in rows.values())
    text = capsys.readouterr().out
    assert "named-4" in text and max(map(len, text.splitlines())) <= 120


def test_wrong_logits_are_not_timed(monkeypatch, tmp_path):
    right = mixed_tasks.named
    monkeypatch.setattr(mixed_tasks, "named", lambda *arguments: right(*arguments) + torch.ones(1))
    with pytest.raises(AssertionError, match="off by 1"):
        mixed_tasks.main(["--dry-run", "--out", str(tmp_path / "x.json")])
