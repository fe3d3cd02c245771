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
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtuning_fast.bench import tables
from qtuning_fast.bench.measure import default_device
from qtuning_fast.bench.results import ROOT, RUNS, provenance, write_json

POLL_SECONDS = 5.0
TOTAL_SECONDS = {"gpu": 530.0, "gpu-models": 530.0}  # of a plan; no step begins after that, and none outlasts it
TABLES = {"blocks.json": "kernels/blocks.json", "choice.json": "qtuning_fast/backends/choice.json"}


@dataclass(frozen=True)
class Step:
    """One command of a plan."""

    name: str
    module: str  # of the bench package
    seconds: float  # its limit
    arguments: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ("--dry-run",)  # its arguments in a dry run, beside the others
    out: str = ""  # the option that takes the file it writes; empty: it writes none
    compiles_only: bool = False  # needs the compiler, which Triton's interpreter would stand in for

    def command(self, folder: Path, *, dry_run: bool) -> list[str]:
        given = self.rehearsal if dry_run else self.arguments
        written = [self.out, str(folder / f"{self.name}.json")] if self.out else []
        return [sys.executable, "-m", f"qtuning_fast.bench.{self.module}", *given, *written]


_FEW_PEERS = ("--dry-run", "--peer", "fused", "composed", "eager", "sdpa")
_OPERATOR = (
    Step(
        "attention",
        "attention",
        200,
        ("--budget-seconds", "170"),
        (*_FEW_PEERS, "--shape", "tiny", "tiny-causal"),
        "--out",
    ),
    Step("decode", "decode", 60, (), _FEW_PEERS, "--out"),
    Step("ingredients", "ingredients", 60, (), ("--dry-run", "--peer", "fused"), "--out"),
    Step("growth", "growth", 90, (), ("--dry-run", "--peer", "fused", "composed", "--with", "B", "tasks"), "--out"),
)
PLANS: dict[str, tuple[Step, ...]] = {
    "cpu": (
        Step("attention", "attention", 3600, (), ("--dry-run", "--peer", "composed", "eager", "sdpa"), "--out"),
        Step("decode", "decode", 600, (), ("--dry-run", "--peer", "composed", "sdpa-no-concat"), "--out"),
        Step("ingredients", "ingredients", 600, (), ("--dry-run",), "--out"),
        Step("growth", "growth", 1200, (), ("--dry-run",), "--out"),
        Step("mixed_tasks", "mixed_tasks", 600, (), ("--dry-run", "--rounds", "2"), "--out"),
        Step("lifelong", "lifelong", 1800, (), ("--dry-run",), "--out"),
        Step("models", "models", 1800, (), ("--dry-run",), "--out"),
    ),
    "gpu": (
        Step("tests", "gpu_tests", 200, (), ("--dry-run",), "--out"),
        Step("tuning", "tune", 110, ("--budget-seconds", "100"), ("--dry-run",), "--out"),
        *_OPERATOR,
        Step("choose", "choose", 60, (), ("--dry-run", "--rounds", "2"), "--out"),
        Step(
            "resources",
            "compile_report",
            60,
            ("--target", "sm_90", "--dtype", "bf16"),
            ("--target", "sm_90", "--dtype", "bf16", "--head-size", "64", "--context", "plain"),
            "--json",
            compiles_only=True,
        ),
    ),
    "gpu-models": (
        Step("decode", "decode", 90, (), _FEW_PEERS, "--out"),
        Step("models", "models", 200, (), ("--dry-run",), "--out"),
        Step("lifelong", "lifelong", 200, (), ("--dry-run",), "--out"),
        Step("mixed_tasks", "mixed_tasks", 60, (), ("--dry-run", "--rounds", "2"), "--out"),
    ),
}


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    said: str = "not begun"
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
        self.header = {"plan": plan, "dry_run": dry_run} | provenance(default_device())
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.json"):
            old.unlink()

    def all(self, total_seconds: float) -> bool:
        """Every step, in order, as far as time allows. Whether all went well."""
        end = time.monotonic() + total_seconds
        for step, outcome in zip(self.steps, self.outcomes):
            left = end - time.monotonic()
            if left < min(20.0, step.seconds):
                outcome.said = "left out: no time"
                continue
            print(f"\n=== {step.name} ===", flush=True)
            self.one(step, outcome, min(step.seconds, left))
        self.gather()
        return all(outcome.said == "done" for outcome in self.outcomes)

    def one(self, step: Step, outcome: Outcome, limit: float) -> None:
        started = time.monotonic()
        outcome.said = "cut off with the run"
        process = subprocess.Popen(
            step.command(self.folder, dry_run=self.dry_run),
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
        tables_now = {name: json.loads((ROOT / path).read_text()) for name, path in TABLES.items()}
        document = self.header | {"steps": [asdict(o) for o in self.outcomes]}
        document |= {"documents": documents, "tables": tables_now}
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
        for entry in document["documents"].get(name, {}).get("entries", {}).values():
            lines.extend(tables.headline(entry))
    return "\n".join(lines)


def unpack(source: Path, results: Path) -> list[Path]:
    """Documents into the folder of results, tables to where they are read; returns what was written."""
    document = json.loads(source.read_text())
    if document["dry_run"]:
        raise SystemExit(f"{source} is of a dry run, which measures nothing")
    written = []
    for name, content in document["documents"].items():
        written.append(results / f"{name}.json")
        results.mkdir(parents=True, exist_ok=True)
        written[-1].write_text(json.dumps(content, indent=1) + "\n")
    for name, content in document["tables"].items():
        written.append(ROOT / TABLES[name])
        rows = ",\n  ".join(json.dumps(row) for row in content)
        written[-1].write_text(f"[\n  {rows}\n]\n")
    return written


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:  # it is being written
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
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/h200", help="where --unpack puts figures")
    options = parser.parse_args(arguments)
    if options.unpack:
        print(*unpack(options.unpack, options.results), sep="\n")
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
    fine = run.all(TOTAL_SECONDS.get(options.plan, math.inf))
    print(summary(json.loads(out.read_text())))
    print(f"\nall of it: {out}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
