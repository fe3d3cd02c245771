"""Plans run step by step, and what is found is kept, whatever becomes of a step."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qtuning_fast.bench.plans import archive
from qtuning_fast.bench.plans import run as running
from qtuning_fast.bench.plans.archive import Archive, summary
from qtuning_fast.bench.plans.plan import Step
from qtuning_fast.bench.plans.run import Processes, Run
from qtuning_fast.bench.plans.schedule import DIED, DONE

WRITES = "import json, os, sys; json.dump({'entries': {}}, open(sys.argv[1], 'w')); "


@dataclass(frozen=True)
class Script(Step):
    """A step that runs a line of Python, to which the file that it writes is given."""

    code: str = ""

    def command(self, folder: Path, deadline: float, *, dry_run: bool) -> list[str]:
        return [sys.executable, "-c", self.code, str(folder / f"{self.name}.json")]


def script(name: str, code: str, seconds: float = 60.0, **options) -> Script:
    return Script(name, "", seconds, code=WRITES + code, **options)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Runs steps within a folder of their own; returns whether all went well, and the file."""
    monkeypatch.setattr(running, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(running, "GRACE", 0.0)
    monkeypatch.setattr(archive, "device", lambda: "cpu")

    def run(*steps, total=60.0, dry_run=False):
        folder, out = tmp_path / "steps", tmp_path / "new" / "plan.json"
        one = Run(steps, Processes(folder, dry_run=dry_run))
        file = Archive("gpu", folder, out, list(one.outcomes.values()), dry_run=dry_run)
        one.gather, one.units, one.verdict = file.write, file.units, file.verdict
        fine = one.all(total)
        return fine, json.loads(out.read_text())

    return run


def said(document):
    return {step["name"]: step["status"] for step in document["steps"]}


def test_what_each_step_finds_is_gathered_with_tables_and_provenance(plan):
    fine, document = plan(script("one", ""), script("two", ""))
    assert fine and said(document) == {"one": "done", "two": "done"}
    assert document["documents"] == {"one": {"entries": {}}, "two": {"entries": {}}}
    assert document["tables"].keys() == {"blocks.json", "backend_order.json"} and document["digests"]
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


def test_what_runs_beside_a_step_runs_at_the_same_time(plan, tmp_path):
    waits = "import time, pathlib; "
    waits += "exec('while not pathlib.Path(sys.argv[1]).with_name(\"b.json\").exists(): time.sleep(0.05)')"
    fine, document = plan(script("a", waits, concurrent=(script("b", ""),)))
    assert fine and said(document) == {"a": "done", "b": "done"}


def test_when_the_first_step_fails_the_rest_of_the_time_goes_to_finding_out_why(plan):
    first = script("first", "sys.exit(1)", 5.0, otherwise=script("why", "sys.exit(1)", 0.0))
    fine, document = plan(first, script("others", ""))
    assert not fine and said(document) == {"first": "exit status 1", "why": "exit status 1", "others": "not begun"}
    fine, document = plan(replace(first, code=WRITES), script("others", ""))
    assert fine and said(document) == {"first": "done", "why": "not begun", "others": "done"}


VERDICT = "json.dump({'entries': {'verdict': {'wrong': WRONG}}}, open(sys.argv[1], 'w')); import time; "


@pytest.mark.parametrize("wrong", ["", "it is off", None])
def test_a_first_step_that_is_slow_is_wrong_only_if_it_says_so(plan, monkeypatch, wrong):
    monkeypatch.setattr(running, "FIRST_GRACE", 0.0)
    code = "import json, sys, time; " if wrong is None else WRITES + VERDICT.replace("WRONG", repr(wrong))
    first = Script("first", "", 1.0, code=code + "time.sleep(60)", otherwise=script("why", "sys.exit(1)"))
    _, document = plan(first, script("others", "", 58.0))
    words = said(document)
    assert words["first"].startswith("stopped at its limit")
    expected = ("exit status 1", "not begun") if wrong else ("not begun", "done")
    assert (words["why"], words["others"]) == expected


def test_time_that_finding_out_why_did_not_need_goes_to_the_others(plan):
    first = script("first", "sys.exit(1)", 5.0, otherwise=script("why", "", 0.0))
    _, document = plan(first, script("others", ""))
    assert said(document) == {"first": "exit status 1", "why": "done", "others": "done"}


UNITS = """
log = json.load(open(sys.argv[1])).get('units', {}) if os.path.exists(sys.argv[1]) else {}
from qtuning_fast.bench.plans.schedule import Schedule
def write():
    json.dump({'entries': {}, 'units': log}, open(sys.argv[1] + '~', 'w'))
    os.replace(sys.argv[1] + '~', sys.argv[1])
schedule = Schedule(log=log, write=write)
for unit in 'abc':
    if schedule.may_begin(unit, 0.01) and unit == 'b': {what}
schedule.end()
"""


@pytest.mark.parametrize("what", ["os.kill(os.getpid(), 9)", "sys.exit(75)", "__import__('time').sleep(60)"])
def test_a_step_that_dies_or_hangs_goes_on_behind_the_unit_that_it_died_in(plan, monkeypatch, what):
    monkeypatch.setattr(running, "PATIENCE", 1.5)
    code = "import json, os, sys" + UNITS.replace("{what}", what)
    fine, document = plan(Script("units", "", 60.0, code=code, within=True))
    [outcome] = document["steps"]
    assert fine and outcome["processes"] == 2, (outcome, document["documents"])
    units = {name: entry["status"] for name, entry in document["documents"]["units"]["units"].items()}
    assert units == {"a": DONE, "b": DIED, "c": DONE}


STARTS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(300)
"""


def test_a_run_that_is_killed_takes_its_steps_along_with_all_that_they_have_started(tmp_path):
    code = f"""
import sys
from pathlib import Path
from qtuning_fast.bench.plans.run import Processes
class Script:
    def command(self, *arguments, **options):
        return [sys.executable, "-c", {STARTS!r}, sys.argv[1]]
Processes(Path("."), dry_run=False).start(Script(), 0.0)
while True:
    pass
"""
    pids = tmp_path / "pids"
    environment = os.environ | {"PYTHONPATH": str(running.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, str(pids)], env=environment)
    try:
        until(lambda: pids.exists() and len(pids.read_text().split()) == 2, 60)
        at_work = [int(pid) for pid in pids.read_text().split()]
        assert all(map(is_alive, at_work))
    finally:
        process.kill()
        process.wait()
    until(lambda: not any(map(is_alive, at_work)), 10)


def until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid):
    """Not counting one that has ended, and that no one has asked about yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_that_is_killed_leaves_all_that_was_found(tmp_path):
    """Not even a signal that no one can catch costs more than what a poll has not seen."""
    command = [
        sys.executable,
        "-m",
        "qtuning_fast.bench.plans.run",
        "gpu",
        "--dry-run",
        "--only",
        "ceilings",
        "counters",
    ]
    out = tmp_path / "gpu.json"
    environment = os.environ | {"PYTHONPATH": str(running.ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--out", str(out)], env=environment, cwd=tmp_path, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if out.exists() and "ceilings" in (json.loads(out.read_text())["documents"].get("ceilings") or {}):
                break
            time.sleep(0.2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    document = json.loads(out.read_text())
    assert document["documents"]["ceilings"]["ceilings"]["flops"] > 0
    assert {step["status"] for step in document["steps"]} & {"done", "cut off with the run"}


def test_a_dry_run_without_a_gpu_interprets_kernels(plan, monkeypatch):
    monkeypatch.setattr(running, "device", lambda: "cpu")
    interpreted = "import os; sys.exit(os.environ.get('TRITON_INTERPRET') != '1')"
    fine, document = plan(script("interprets", interpreted), dry_run=True)
    assert fine, said(document)


def test_a_table_that_is_being_written_stops_nothing(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "TABLES", {"blocks.json": str(tmp_path / "blocks.json")})
    (tmp_path / "blocks.json").write_text("[{")
    fine, document = plan(script("one", ""))
    assert fine and document["tables"] == {}


def test_an_interrupted_run_says_where_its_findings_are(tmp_path, monkeypatch, capsys):
    def interrupted(self, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "all", interrupted)
    monkeypatch.setattr(running.triton_cache, "unpack", lambda: None)
    monkeypatch.setattr(running.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(running, "RUNS", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert running.main(["cpu", "--out", "found.json"]) == 130
    assert "What was found by then: found.json" in capsys.readouterr().out


def test_wrong_plans_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(running, "device", lambda: "cpu")
    for arguments, words in ((["gpu"], "takes a GPU"), ([], "name a plan"), (["cpu", "--only", "x"], "no step x")):
        with pytest.raises(SystemExit):
            running.main(arguments)
        assert words in capsys.readouterr().err


def test_time_that_steps_do_not_ask_for_is_theirs(plan, monkeypatch):
    deadlines = []
    monkeypatch.setattr(Run, "together", lambda self, step, deadline: deadlines.append(deadline - self.clock()))
    plan(script("first", "", 20.0), script("second", "", 70.0), total=100.0)
    assert deadlines == [pytest.approx(30.0, abs=1), pytest.approx(100.0, abs=1)]
