"""Every step of a plan is a module that writes its file, and a plan has time for all of them."""

import shlex
import shutil
import subprocess

import pytest

from qtuning_fast.bench.plans import run
from qtuning_fast.bench.plans.plan import PLANS, TOTAL_SECONDS, all_steps
from qtuning_fast.bench.results import ROOT


@pytest.mark.parametrize("plan_name", TOTAL_SECONDS)
def test_a_plan_has_time_for_all_its_steps(plan_name):
    assert sum(step.seconds for step in PLANS[plan_name]) <= TOTAL_SECONDS[plan_name]


@pytest.mark.parametrize("plan_name", PLANS)
def test_steps_are_modules_and_write_where_they_are_looked_for(plan_name, tmp_path):
    for step in all_steps(PLANS[plan_name]):
        command = step.command(tmp_path, 100.0, dry_run=False)
        assert (ROOT / "bench" / f"{step.module.replace('.', '/')}.py").exists() and command[-2] == "--out"
        assert command[-1] == str(tmp_path / f"{step.name}.json") and ("--deadline" in command) == step.within


def test_a_dry_run_has_arguments_of_its_own(tmp_path):
    [step] = [step for step in PLANS["gpu-second"] if step.name == "growth"]
    command = step.command(tmp_path, 100.0, dry_run=True)
    assert "--dry-run" in command and "tasks" in command and "N" not in command


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("target", ["bench-gpu", "bench-gpu-second", "bench-gpu-drop-in", "bench-gpu-models"])
def test_make_names_the_plan_and_its_steps(target, monkeypatch):
    plan = target.removeprefix("bench-")
    steps = [step.name for step in PLANS[plan][:2]]
    make = ["make", "-n", "--no-print-directory", target, "DRY=1", f"ONLY={' '.join(steps)}", "GPU_PYTHON=python3"]
    said = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    begun = []

    def begin(steps, executor):
        begun.extend(step.name for step in steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "Run", begin)
    with pytest.raises(KeyboardInterrupt):
        run.main(shlex.split(said.partition("plans.run")[2]))
    assert begun == steps
