"""Runs the benchmarks of a plan one after the other, the most important first, and gathers all they find in one file.

    python -m qtuning_fast.bench.run cpu                       all questions on a CPU
    python -m qtuning_fast.bench.run gpu --out FILE            tests, tuning and the operator's questions; 9 minutes
    python -m qtuning_fast.bench.run gpu-models --out FILE     decoding, 200 tasks in a row, whole models; 9 minutes
    python -m qtuning_fast.bench.run gpu --dry-run             the same steps on tiny shapes, without a GPU if need be
    python -m qtuning_fast.bench.run --unpack FILE             what a run brought home, to where it belongs

Each step is a process of its own with a limit. FILE is written anew every few seconds while they run, so that a run
that is cut off counts as far as it got. It holds each step's outcome and all that the steps wrote, the block table and
the table of backends among them; the last thing on the screen is a short table.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qtuning_fast.bench import tables
from qtuning_fast.bench.measure import default_device
from qtuning_fast.bench.results import ROOT, RUNS, TABLES, provenance, write_json

POLL_SECONDS = 5.0
TOTAL_SECONDS = {"gpu": 530.0, "gpu-models": 530.0}  # of a plan; no step begins after that, and none outlasts it
NOT_BEGUN, NO_TIME = "not begun", "left out: no time"
MEASURED_BY = {"blocks.json": "tuning", "choice.json": "choose"}  # which step writes a table


@dataclass(frozen=True)
class Step:
    """One command of a plan."""

    name: str
    module: str  # of the bench package
    seconds: float  # its limit, and what no other step asks for
    arguments: tuple[str, ...] = ()  # "{limit}": seconds after which nothing new should begin
    rehearsal: tuple[str, ...] = ("--dry-run",)  # its arguments in a dry run, beside the others
    out: str = ""  # the option that takes the file it writes; empty: it writes none
    compiles_only: bool = False  # needs the compiler, which Triton's interpreter would stand in for

    def command(self, folder: Path, limit: float, *, dry_run: bool) -> list[str]:
        given = [each.format(limit=f"{limit - 20:.0f}") for each in (self.rehearsal if dry_run else self.arguments)]
        written = [self.out, str(folder / f"{self.name}.json")] if self.out else []
        return [sys.executable, "-m", f"qtuning_fast.bench.{self.module}", *given, *written]


_FEW_PEERS = ("--dry-run", "--peer", "fused", "composed", "eager", "sdpa")
_ATTENTION = Step(
    "attention",
    "attention",
    150,
    arguments=("--budget-seconds", "{limit}"),
    rehearsal=(*_FEW_PEERS, "--shape", "tiny", "tiny-causal"),
    out="--out",
)
_DECODE = Step(
    "decode", "decode", 30, arguments=("--quick", "--budget-seconds", "{limit}"), rehearsal=_FEW_PEERS, out="--out"
)
_INGREDIENTS = Step(
    "ingredients",
    "ingredients",
    25,
    arguments=("--quick",),
    rehearsal=("--dry-run", "--peer", "fused"),
    out="--out",
)
_GROWTH = Step(
    "growth",
    "growth",
    35,
    arguments=("--peer", "fused", "composed", "eager", "sdpa"),
    rehearsal=("--dry-run", "--peer", "fused", "composed", "--with", "B", "tasks"),
    out="--out",
)
_RESOURCES = Step(
    "resources",
    "compile_report",
    20,
    arguments=("--target", "sm_90", "--dtype", "bf16"),
    rehearsal=("--target", "sm_90", "--dtype", "bf16", "--head-size", "64", "--context", "plain"),
    out="--json",
    compiles_only=True,
)
_MIXED = Step("mixed_tasks", "mixed_tasks", 60, rehearsal=("--dry-run", "--rounds", "2"), out="--out")
PLANS: dict[str, tuple[Step, ...]] = {
    "cpu": (
        Step("attention", "attention", 3600, rehearsal=("--dry-run", "--peer", "composed", "eager"), out="--out"),
        replace(_DECODE, seconds=600, arguments=(), rehearsal=("--dry-run", "--peer", "composed", "sdpa-no-concat")),
        replace(_INGREDIENTS, seconds=600, arguments=(), rehearsal=("--dry-run",)),
        replace(_GROWTH, seconds=1200, arguments=(), rehearsal=("--dry-run",)),
        replace(_MIXED, seconds=600),
        Step("lifelong", "lifelong", 1800, out="--out"),
        Step("models", "models", 1800, out="--out"),
    ),
    "gpu": (
        Step("tests", "gpu_tests", 150, out="--out"),
        Step("tuning", "tune", 90, arguments=("--budget-seconds", "{limit}"), out="--out"),
        _ATTENTION,
        _DECODE,
        _INGREDIENTS,
        _GROWTH,
        Step("choose", "choose", 30, rehearsal=("--dry-run", "--rounds", "2"), out="--out"),
        _RESOURCES,
    ),
    "gpu-models": (
        replace(_DECODE, seconds=60),
        Step("models", "models", 200, out="--out"),
        Step("lifelong", "lifelong", 210, out="--out"),
        _MIXED,
    ),
}


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    said: str = NOT_BEGUN
    seconds: float = 0.0


class Run:
    """One run of a plan.

    Args:
        folder: where the steps write.
        out: the file that gathers it all.
    """

    def __init__(self, plan: str, steps: Sequence[Step], folder: Path, out: Path, *, dry_run: bool) -> None:
        self.steps, self.folder, self.out, self.dry_run = steps, folder, out, dry_run
        self.outcomes = [Outcome(step.name) for step in steps]
        self.tables: dict[str, Any] = {}
        self.header = {"plan": plan, "dry_run": dry_run} | provenance(default_device())
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.json"):
            old.unlink()

    def all(self, total_seconds: float) -> bool:
        """Every step, in order, as far as time allows. Whether all went well."""
        end = time.monotonic() + total_seconds
        for number, (step, outcome) in enumerate(zip(self.steps, self.outcomes)):
            left = end - time.monotonic()
            if left < min(15.0, step.seconds):
                outcome.said = NO_TIME
                continue
            print(f"\n=== {step.name} ===", flush=True)
            others = sum(later.seconds for later in self.steps[number + 1 :])
            self.one(step, outcome, min(max(step.seconds, left - others), left))
        self.gather()
        return all(outcome.said == "done" for outcome in self.outcomes)

    def one(self, step: Step, outcome: Outcome, limit: float) -> None:
        started = time.monotonic()
        outcome.said = "cut off with the run"
        process = subprocess.Popen(
            step.command(self.folder, limit, dry_run=self.dry_run),
            cwd=ROOT,
            env=self._environment(step),
            start_new_session=True,  # so that it can be stopped with all that it has started
        )
        try:
            while process.poll() is None:
                outcome.seconds = round(time.monotonic() - started, 1)
                self.gather()
                try:
                    process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    if time.monotonic() - started > limit:
                        outcome.said = f"stopped at its limit of {limit:.0f} s"
                        return
            outcome.said = "done" if process.returncode == 0 else f"exit status {process.returncode}"
        finally:
            _stop(process)
            outcome.seconds = round(time.monotonic() - started, 1)
            self.gather()

    def gather(self) -> None:
        """Writes all there is by now into one file."""
        documents = {path.stem: _read(path) for path in sorted(self.folder.glob("*.json"))}
        tables_now = {name: _read(ROOT / path) for name, path in TABLES.items()}
        self.tables |= {name: table for name, table in tables_now.items() if table is not None}
        document = self.header | {"steps": [asdict(o) for o in self.outcomes]}
        document |= {"documents": documents, "tables": self.tables}
        write_json(self.out, document)

    def _environment(self, step: Step) -> dict[str, str]:
        """A dry run without a GPU runs kernels in Triton's interpreter."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment.pop("TRITON_INTERPRET", None)
        if self.dry_run and default_device() == "cpu":
            environment["OMP_NUM_THREADS"] = "1"  # nothing is measured, and threads that wait disturb others
            if not step.compiles_only:
                environment["TRITON_INTERPRET"] = "1"
        return environment


def summary(document: dict[str, Any]) -> str:
    """Steps and headlines, at most 120 columns wide."""
    lines = [f"\n=== {document['plan']}, {document['device']['name']}, {document['date']} ==="]
    lines += [f"  {step['name']:<14}{step['seconds']:>8.1f} s  {step['said']}" for step in document["steps"]]
    for name in ("attention", "decode"):
        for entry in (document["documents"].get(name) or {}).get("entries", {}).values():
            lines.extend(tables.headline(entry))
    return "\n".join(lines)


def unpack(source: Path) -> list[Path]:
    """Documents into the device's folder of results, tables that were measured to where they are read.

    Returns what was written.
    """
    document = json.loads(source.read_text())
    results = ROOT / "bench/results" / device_folder(document["device"])
    if document["dry_run"]:
        raise SystemExit(f"{source} is of a dry run, which measures nothing")
    written = []
    for name, content in document["documents"].items():
        if content is None:  # it was being written at the last moment
            continue
        written.append(results / f"{name}.json")
        results.mkdir(parents=True, exist_ok=True)
        written[-1].write_text(json.dumps(content, indent=1) + "\n")
    begun = {step["name"] for step in document["steps"] if step["said"] not in (NOT_BEGUN, NO_TIME)}
    for name, content in document["tables"].items():
        if MEASURED_BY[name] not in begun:  # it is the one that the run found
            continue
        written.append(ROOT / TABLES[name])
        rows = ",\n  ".join(json.dumps(row) for row in content)
        written[-1].write_text(f"[\n  {rows}\n]\n")
    return written


def device_folder(device: Mapping[str, Any]) -> str:
    """As short as people say it: "cpu", "h200"."""
    model = re.search(r"[A-Z]+\d+", device["name"])
    return "cpu" if device["type"] == "cpu" else (model[0] if model else device["name"].replace(" ", "-")).lower()


def _read(path: Path) -> Any:
    """None while it is being written."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        return None


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """With all the processes that it has started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="?", choices=PLANS)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; nothing is measured, no table rewritten")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps of the plan only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: runs/bench/PLAN.json")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="put what a run found where it belongs")
    options = parser.parse_args(arguments)
    if options.unpack:
        print(*unpack(options.unpack), sep="\n")
        return 0
    if options.plan is None:
        parser.error(f"name a plan: {', '.join(PLANS)}")
    if options.plan != "cpu" and default_device() == "cpu" and not options.dry_run:
        parser.error(f"plan {options.plan} takes a GPU; --dry-run rehearses it without")
    unknown = set(options.only or ()) - {step.name for step in PLANS[options.plan]}
    if unknown:
        parser.error(f"plan {options.plan} has no step {', '.join(unknown)}")
    out = options.out or RUNS / f"{options.plan}.json"
    steps = [step for step in PLANS[options.plan] if not options.only or step.name in options.only]
    run = Run(options.plan, steps, RUNS / options.plan, out, dry_run=options.dry_run)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step at work is stopped, too
    try:
        fine = run.all(TOTAL_SECONDS.get(options.plan, math.inf))
    except KeyboardInterrupt:
        print(f"\nInterrupted. What was found by then: {out}")
        return 130
    print(summary(json.loads(out.read_text())))
    print(f"\nall of it: {out}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
