"""The load of `rows.serving`: what is asked, how it is measured, and that wrong answers are not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qtuning_fast.bench.rows import serving


def test_each_row_is_asked_the_same_questions():
    load = serving.Load(50, 4)
    questions = load.questions(7, seed=0)
    assert questions == load.questions(7, seed=0) != load.questions(7, seed=1)
    assert {task for _, task in questions} <= {f"task-{n:04d}" for n in range(7)} and len(questions) == 50
    assert all(3 <= len(text.split()) <= load.words for text, _ in questions)


def test_the_commands_differ_in_what_is_compared_alone(tmp_path):
    mixed, one, lora = (serving.command_of(row, tmp_path, 8000, 100, 1) for row in serving.ROWS)
    assert [each for each in one if not each.startswith("--metrics-port")] == [
        *(each for each in mixed if not each.startswith("--metrics-port")),
        "--batch=1",
    ]
    assert lora[-4:] == [str(tmp_path), "8000", "100", "1"] and "serving_lora" in lora[2]


def test_a_table_has_failures_too():
    row = {"requests_a_second": 10.0, "p50_ms": 1.0, "p99_ms": 2.0, "memory": 2**20, "error": None}
    text = serving.table(5, {"mixed": row, "lora": {"error": "no peft"}})
    assert "5 tasks" in text and "no peft" in text and max(map(len, text.splitlines())) <= 120


@pytest.fixture
def run(tiny_model_folder, tmp_path) -> Path:
    serving.write_run(tmp_path / "run", str(tiny_model_folder), 3)
    return tmp_path / "run"


def test_wrong_answers_are_not_timed(run):
    pytest.importorskip("pydantic")
    from qtuning_fast.serving.engine import Engine
    from qtuning_fast.serving.options import ServingOptions
    from qtuning_fast.serving.schema import Asked

    questions = serving.Load(8, 4).questions(3, seed=0)
    replies = Engine(run, ServingOptions()).answer([Asked(*each) for each in questions])
    answers = [reply.model_dump() for reply in replies]
    serving._check(run, questions, answers)
    answers[3]["outputs"]["no"] += 0.01
    with pytest.raises(AssertionError, match=r"an answer of the server is off by 0\.01"):
        serving._check(run, questions, answers)


@pytest.mark.thorough
def test_a_rehearsal_ends_in_a_file_and_a_table(tiny_model_folder, tmp_path, capsys):
    pytest.importorskip("ray", reason="serving needs ray: pip install 'qtuning_fast[serve]'")
    out = tmp_path / "serving.json"
    options = ["--dry-run", "--tasks", "3", "--row", "mixed", "lora", "--model", str(tiny_model_folder)]
    assert serving.main([*options, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["entries"]["3-tasks"]["rows"]
    assert list(rows) == ["mixed", "lora"] and all(row["error"] is None for row in rows.values())
    assert all(row["requests_a_second"] > 0 and row["p99_ms"] >= row["p50_ms"] for row in rows.values())
    assert "requests/s" in capsys.readouterr().out
