"""The tests that need a GPU, in several processes side by side: most of their time goes into compiling kernels.

    python -m qtuning_fast.bench.gpu_tests --out FILE

FILE counts the tests as they end, and names each one that failed with the first line of why. The harness that takes
times is tested alone, since processes that share a GPU disturb each other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qtuning_fast.bench.results import ROOT, RUNS, Results

ALONE = ("tests/bench/test_timing.py",)
SIDE_BY_SIDE = (
    *("tests/backends", "tests/kernels", "tests/test_model.py", "tests/integrations/test_mixed.py"),
    *("tests/bench/test_peers.py", "tests/bench/test_models.py"),
)
SHARDS, REHEARSED_SHARDS = 8, 40
POLL_SECONDS = 2.0
LOG = "QTUNING_FAST_TEST_LOG"


def pytest_runtest_logreport(report: Any) -> None:
    """A hook of pytest, for which this module is a plugin: a line for each test as it ends."""
    if report.when != "call" and not report.failed and not report.skipped:  # set-up and what comes after
        return
    lines = report.longreprtext.splitlines() if report.failed else []
    why = next((line[1:].strip() for line in lines if line.startswith("E ")), "")[:200]  # as pytest marks it
    with open(os.environ[LOG], "a") as log:
        log.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "why": why}) + "\n")


def run(shards: Sequence[Sequence[str]], folder: Path, heard: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Processes of pytest side by side, each with arguments of its own.

    Returns:
        Counts by outcome, and `failures`: by test, the first line of why. `heard` gets the same every few seconds.
    """
    logs = [folder / f"{number}.jsonl" for number in range(len(shards))]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "--continue-on-collection-errors",
        "-p",
        __spec__.name,
    ]
    processes = [
        subprocess.Popen([*command, *arguments], cwd=ROOT, env=os.environ | {LOG: str(log)})
        for arguments, log in zip(shards, logs)
    ]
    while any(process.poll() is None for process in processes):
        time.sleep(POLL_SECONDS)
        heard(read(logs))
    found = read(logs)
    for number, process in enumerate(processes):
        if process.returncode not in (0, 1, 5):  # passed, failed, no tests
            found["failures"][f"process {number}"] = f"exit status {process.returncode}"
    heard(found)
    return found


def read(logs: Sequence[Path]) -> dict[str, Any]:
    """What the hook has written by now."""
    lines = [json.loads(line) for log in logs if log.exists() for line in log.read_text().splitlines()]
    failures = {line["test"]: line["why"] for line in lines if line["outcome"] == "failed"}
    return {**Counter(line["outcome"] for line in lines), "failures": failures}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=SHARDS, help="processes side by side")
    parser.add_argument("--dry-run", action="store_true", help="one of forty shards, to see that all is there")
    parser.add_argument("--out", type=Path, default=RUNS / "tests.json", metavar="FILE")
    options = parser.parse_args(arguments)
    from qtuning_fast.bench.measure import default_device  # as a plugin of pytest this module needs none of it

    results = Results("gpu_tests", options.out, default_device(), sys.argv[1:] if arguments is None else arguments)
    count = REHEARSED_SHARDS if options.dry_run else options.shards
    shards = [[*SIDE_BY_SIDE, "--shard", f"{number}/{count}"] for number in range(count)]
    failed = 0
    for name, plan in (("alone", [list(ALONE)]), ("side by side", shards[:1] if options.dry_run else shards)):
        started = time.perf_counter()

        def heard(found: dict[str, Any], name: str = name, started: float = started) -> None:
            results.add(name, found | {"seconds": round(time.perf_counter() - started, 1)})

        with tempfile.TemporaryDirectory() as folder:
            found = run(plan, Path(folder), heard)
        failures = found.pop("failures")
        print(f"{name}: {json.dumps(found)}", *failures.items(), sep="\n  ", flush=True)
        failed += len(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
