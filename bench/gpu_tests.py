"""The tests that need a GPU, in several processes side by side: most of their time goes into compiling kernels.

    python -m qtuning_fast.bench.gpu_tests --out FILE

FILE names each test that failed, with the first line of why. The harness that takes times is tested alone, since
processes that share a GPU disturb each other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qtuning_fast.bench.measure import default_device
from qtuning_fast.bench.results import ROOT, RUNS, Results

ALONE = ("tests/bench/test_timing.py",)
SIDE_BY_SIDE = ("tests/backends", "tests/kernels", "tests/test_model.py", "tests/bench/test_peers.py")
SHARDS = 8


@dataclass
class Outcome:
    """Of one process of pytest, or of several."""

    counts: Counter[str] = field(default_factory=Counter)  # passed, failed, skipped
    failures: dict[str, str] = field(default_factory=dict)  # by test, the first line of why

    def add(self, other: "Outcome") -> None:
        self.counts += other.counts
        self.failures |= other.failures


def read(report: Path) -> Outcome:
    """From pytest's report in JUnit's form."""
    outcome = Outcome()
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [x for kind in ("failure", "error") for x in case.findall(kind)]
        skipped = case.find("skipped") is not None
        outcome.counts["failed" if wrong else "skipped" if skipped else "passed"] += 1
        for one in wrong:
            lines = one.get("message", "").strip().splitlines()
            outcome.failures[f"{case.get('classname')}::{case.get('name')}"] = lines[0][:200] if lines else ""
    return outcome


def run(shards: Sequence[Sequence[str]], folder: Path) -> Outcome:
    """Processes of pytest side by side, each with arguments of its own."""
    reports = [folder / f"{number}.xml" for number in range(len(shards))]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *arguments, f"--junitxml={report}"], cwd=ROOT
        )
        for arguments, report in zip(shards, reports)
    ]
    outcome = Outcome()
    for number, (process, report) in enumerate(zip(processes, reports)):
        process.wait()
        if report.exists():
            outcome.add(read(report))
        else:  # it died
            outcome.failures[f"process {number}"] = f"exit status {process.returncode}"
    return outcome


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=SHARDS, help="processes side by side")
    parser.add_argument("--dry-run", action="store_true", help="one of forty shards, to see that all is there")
    parser.add_argument("--out", type=Path, default=RUNS / "tests.json", metavar="FILE")
    options = parser.parse_args(arguments)
    results = Results("gpu_tests", options.out, default_device(), sys.argv[1:] if arguments is None else arguments)
    plans = {"alone": [list(ALONE)]}
    count = 40 if options.dry_run else options.shards
    shards = [[*SIDE_BY_SIDE, "--shard", f"{number}/{count}"] for number in range(count)]
    plans["side by side"] = shards[:1] if options.dry_run else shards
    failed = 0
    for name, arguments_of_each in plans.items():
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(arguments_of_each, Path(folder))
        seconds = round(time.perf_counter() - started, 1)
        results.add(name, {**outcome.counts, "failures": outcome.failures, "seconds": seconds})
        print(f"{name}: {json.dumps(outcome.counts)}, {seconds} s", *outcome.failures.items(), sep="\n  ", flush=True)
        failed += len(outcome.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
