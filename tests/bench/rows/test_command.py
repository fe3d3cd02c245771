"""What all commands share: their options, and entries that fail without stopping the others."""

import math
from functools import partial

from qtuning_fast.bench import measure
from qtuning_fast.bench.results import Results
from qtuning_fast.bench.rows import command
from qtuning_fast.bench.rows.command import Command, in_a_plan, measure_each, turns_of


def test_a_command_takes_what_it_asks_for(tmp_path):
    line = Command("qtuning_fast.bench.rows.growth", "About.", quick=True, deadline=True)
    options = line.parse(["--out", str(tmp_path / "x.json"), "--deadline", "5", "--quick"])
    assert in_a_plan(options) and turns_of(options) == measure.QUICK
    results = line.results(options, "cpu", rounds=3)
    assert results.document["question"] == "growth" and results.document["rounds"] == 3
    assert results.document["command"].startswith("python -m qtuning_fast.bench.rows.growth --out ")
    options = Command("a.b", None).parse(["--dry-run"])
    assert options.out.name == "b.json" and not in_a_plan(options) and turns_of(options) == measure.REHEARSED


def test_an_earlier_process_leaves_its_entries(tmp_path):
    line = Command("a.b", None, deadline=True)
    given = ["--out", str(tmp_path / "b.json")]
    line.results(line.parse(given), "cpu").add("a", {"ms": 1})
    assert line.results(line.parse([*given, "--deadline", "9"]), "cpu").document["entries"] == {"a": {"ms": 1}}
    assert line.results(line.parse(given), "cpu").document["entries"] == {}


def test_an_entry_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def job(name):
        if name == "b":
            raise RuntimeError("died")
        return {"name": name}

    monkeypatch.setattr(command, "in_a_process", lambda job: job())
    results = Results("x", tmp_path / "x.json", "cpu")
    assert measure_each(results, {name: partial(job, name) for name in "abc"}, lambda entry: entry["name"] * 3) == 1
    assert list(results.document["entries"]) == ["a", "c"] and results.document["errors"] == {"b": "RuntimeError: died"}
    text = capsys.readouterr().out
    assert "aaa" in text and "ccc" in text and "b: RuntimeError: died" in text
    assert measure_each(Results("x", tmp_path / "x.json", "cpu"), {"a": partial(job, "a")}, str) == 0


def test_under_a_deadline_a_job_goes_on_with_its_entry(tmp_path):
    def job(*, schedule, known, wrote):
        wrote({"half": True})
        return {"known": known, "deadline": schedule.deadline}

    results = Results("x", tmp_path / "x.json", "cpu")
    results.add("a", {"ms": 1})
    assert measure_each(results, {"a": job}, str, 1e12) == 0 and math.isfinite(1e12)
    assert results.document["entries"]["a"] == {"known": {"ms": 1}, "deadline": 1e12}
