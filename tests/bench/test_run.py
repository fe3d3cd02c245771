"""Plans run step by step, and what is found is kept, whatever becomes of a step."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qtuning_fast.bench import run as running
from qtuning_fast.bench.run import PLANS, Run, Step, summary, unpack

WRITES = "import json, sys; json.dump({'entries': {}}, open(sys.argv[1], 'w')); "


@dataclass(frozen=True)
class Script(Step):
    """A step that runs a line of Python, to which the file that it writes is given."""

    code: str = ""

    def command(self, folder: Path, limit: float, *, dry_run: bool) -> list[str]:
        return [sys.executable, "-c", self.code, str(folder / f"{self.name}.json")]


def script(name: str, code: str, seconds: float = 60.0) -> Script:
    return Script(name, "", seconds, code=WRITES + code)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Runs steps within a folder of their own; returns whether all went well, and the file."""
    monkeypatch.setattr(running, "POLL_SECONDS", 0.05)

    def run(*steps, total=60.0, dry_run=False):
        out = tmp_path / "new" / "plan.json"
        fine = Run("gpu", steps, tmp_path / "steps", out, dry_run=dry_run).all(total)
        return fine, json.loads(out.read_text())

    return run


def said(document):
    return {step["name"]: step["said"] for step in document["steps"]}


def test_what_each_step_finds_is_gathered_with_tables_and_provenance(plan):
    fine, document = plan(script("one", ""), script("two", ""))
    assert fine and said(document) == {"one": "done", "two": "done"}
    assert document["documents"] == {"one": {"entries": {}}, "two": {"entries": {}}}
    assert document["tables"].keys() == {"blocks.json", "choice.json"} and document["digests"]
    assert "one" in summary(document) and "done" in summary(document)


def test_a_step_that_fails_or_takes_too_long_does_not_stop_the_others(plan):
    sleeps = "import subprocess; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    steps = script("fails", "sys.exit(3)", 0.5), script("sleeps", sleeps, 0.5), script("last", "", 20.0)
    fine, document = plan(*steps, total=24.0)
    assert not fine and time.monotonic() - started < 30
    words = said(document)
    assert words["sleeps"].startswith("stopped at its limit of ")
    assert (words["fails"], words["last"]) == ("exit status 3", "done")
    assert document["documents"].keys() == {"fails", "sleeps", "last"}  # what was written before the end


def test_no_step_begins_when_the_time_is_spent(plan):
    fine, document = plan(script("first", ""), script("second", ""), total=1.0)
    assert not fine and said(document) == dict.fromkeys(("first", "second"), "left out: no time")


def test_a_dry_run_without_a_gpu_interprets_kernels_but_does_not_compile_so(plan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    interpreted = "import os; sys.exit(os.environ.get('TRITON_INTERPRET') != '1')"
    code = "import os, sys; sys.exit('TRITON_INTERPRET' in os.environ)"
    compiled = Script("compiles", "", 60.0, code=code, compiles_only=True)
    fine, document = plan(script("interprets", interpreted), compiled, dry_run=True)
    assert fine, said(document)


def test_a_run_is_unpacked_to_where_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "ROOT", tmp_path)
    for path in running.TABLES.values():
        (tmp_path / path).parent.mkdir(parents=True)
    document = {"dry_run": False, "documents": {"growth": {"entries": {}}, "half": None}}
    document["tables"] = {"blocks.json": [{"a": 1}, {"b": 2}], "choice.json": []}
    document["device"] = {"type": "cuda", "name": "NVIDIA H200"}
    document["steps"] = [{"name": "tuning", "said": "done"}, {"name": "choose", "said": running.NO_TIME}]
    source = tmp_path / "gpu.json"
    source.write_text(json.dumps(document))
    unpack(source)
    assert [path.name for path in (tmp_path / "bench/results/h200").iterdir()] == ["growth.json"]
    assert (tmp_path / "kernels/blocks.json").read_text() == '[\n  {"a": 1},\n  {"b": 2}\n]\n'
    assert not (tmp_path / running.TABLES["choice.json"]).exists()  # which was not measured
    source.write_text(json.dumps(document | {"dry_run": True}))
    with pytest.raises(SystemExit, match="dry run"):
        unpack(source)


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        ({"type": "cpu", "name": "AMD EPYC 9B45"}, "cpu"),
        ({"type": "cuda", "name": "NVIDIA H100 80GB HBM3"}, "h100"),
        ({"type": "cuda", "name": "Some Card"}, "some-card"),
    ],
)
def test_a_device_has_a_folder(device, folder):
    assert running.device_folder(device) == folder


def test_a_table_that_is_being_written_stops_nothing(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "TABLES", {"blocks.json": str(tmp_path / "blocks.json")})
    (tmp_path / "blocks.json").write_text("[{")
    fine, document = plan(script("one", ""))
    assert fine and document["tables"] == {}


@pytest.mark.parametrize("plan_name", running.TOTAL_SECONDS)
def test_a_plan_has_time_for_all_its_steps(plan_name):
    assert sum(step.seconds for step in PLANS[plan_name]) <= running.TOTAL_SECONDS[plan_name]


def test_an_interrupted_run_says_where_its_findings_are(tmp_path, monkeypatch, capsys):
    def interrupted(self, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "all", interrupted)
    monkeypatch.setattr(running.signal, "signal", lambda *arguments: None)
    monkeypatch.chdir(tmp_path)
    assert running.main(["cpu", "--out", "found.json"]) == 130
    assert "What was found by then: found.json" in capsys.readouterr().out


def test_wrong_plans_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, words in ((["gpu"], "takes a GPU"), ([], "name a plan"), (["cpu", "--only", "x"], "no step x")):
        with pytest.raises(SystemExit):
            running.main(arguments)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("plan_name", PLANS)
def test_steps_are_modules_and_write_where_they_are_looked_for(plan_name, tmp_path):
    for step in PLANS[plan_name]:
        command = step.command(tmp_path, 100.0, dry_run=False)
        assert (running.ROOT / "bench" / f"{step.module}.py").exists() and command[-2] == step.out
        assert command[-1] == str(tmp_path / f"{step.name}.json") and not any("{" in each for each in command)


def test_time_that_steps_do_not_ask_for_is_theirs(plan, monkeypatch):
    limits = []
    monkeypatch.setattr(Run, "one", lambda self, step, outcome, limit: limits.append(limit))
    plan(script("first", "", 20.0), script("second", "", 70.0), total=100.0)
    assert limits == [pytest.approx(30.0, abs=1), pytest.approx(100.0, abs=1)]
