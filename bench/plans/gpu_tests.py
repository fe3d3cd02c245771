"""The tests that need a GPU, in several processes side by side: most of their time goes into compiling kernels.

    python -m qtuning_fast.bench.plans.gpu_tests --out FILE                   all of them
    python -m qtuning_fast.bench.plans.gpu_tests --part telling --out FILE    without most of those in float32

FILE counts the tests as they end, and names each one that failed with the first line of why. The most informative tests
come first. Kernels in IEEE float32 compile for twenty seconds each, twenty times as long as others: three of their
tests are in the part "telling". The harness that takes times is tested alone, since processes that share a GPU disturb
each other.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.results import ROOT

ALONE = ("tests/bench/test_timing.py",)
SIDE_BY_SIDE = (
    *("tests/attention", "tests/kernels", "tests/model/test_model.py", "tests/integrations/test_mixed.py"),
    *("tests/bench/test_peers.py", "tests/bench/rows/test_models.py"),
)
SHARDS, REHEARSED_SHARDS = 15, 40
POLL_SECONDS = 2.0
LOG, PART = "QTUNING_FAST_TEST_LOG", "QTUNING_FAST_TEST_PART"

IEEE = "fused_gpu", "[float32-"  # what such a test's name holds
CHOSEN_IEEE = ("test_real_shapes[float32-minilm", "test_real_shapes[float32-bert-base]", "test_every_gate[float32-tanh")
TELLING = (  # what a test's name holds; those that take longest and are wanted begin first
    *(("fused_gpu", name) for name in CHOSEN_IEEE),
    ("fused_gpu", "test_real_shapes[bfloat16-"),
    ("fused_gpu", "test_the_same_bits"),
    ("fused_gpu", "graph"),
    ("fused_gpu", "two_streams"),
    ("composed_gpu", "test_real_shapes"),
    ("vendors_gpu", "test_both_passes"),
    ("test_mixed", ""),
    ("composed_gpu", "test_the_same_bits"),
    ("composed_gpu", "graph"),
    ("fused_gpu", "compiled"),
    ("fused_gpu", "[bfloat16-"),
    ("fused_gpu", "banks"),
    ("fused_gpu", "mask"),
    ("test_gate", ""),
    ("vendors_gpu", ""),
    ("fused_gpu", "memory"),
    ("composed_gpu", ""),
    ("test_peers", ""),
    ("fused_gpu", "odd_sizes"),
    ("fused_gpu", "[float16-"),
    ("fused_gpu", "[tf32-"),
)


def rank(test: str) -> int:
    """The place of a test in the order, by its name."""
    return next((i for i, words in enumerate(TELLING) if all(word in test for word in words)), len(TELLING))


def is_told(test: str) -> bool:
    """Whether a test is in the part "telling"."""
    return not all(word in test for word in IEEE) or any(name in test for name in CHOSEN_IEEE)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """A hook of pytest, for which this module is a plugin: chooses and orders the tests before they are dealt out."""
    chosen = [item for item in items if item.get_closest_marker("gpu")]
    if os.environ.get(PART) == "telling":
        chosen = [item for item in chosen if is_told(item.nodeid)]
    items[:] = sorted(chosen, key=lambda item: rank(item.nodeid))
    settle()  # so that a shard finds what another one has compiled


def pytest_runtest_logreport(report: Any) -> None:
    """A hook of pytest: writes a line for each test as it ends."""
    if report.when != "call" and not report.failed and not report.skipped:  # set-up and what comes after
        return
    lines = report.longreprtext.splitlines() if report.failed else []
    why = next((line[1:].strip() for line in lines if line.startswith("E ")), "")[:200]  # as pytest marks it
    seconds = round(getattr(report, "duration", 0.0), 2)
    line = {"test": report.nodeid, "outcome": report.outcome, "why": why, "seconds": seconds}
    with open(os.environ[LOG], "a") as log:
        log.write(json.dumps(line) + "\n")


def run(
    shards: Sequence[Sequence[str]],
    folder: Path,
    heard: Callable[[dict[str, Any]], None],
    *,
    part: str = "all",
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Runs processes of pytest side by side, each with its own arguments, until the deadline.

    Returns:
        Counts by outcome; `failures`: by test, the first line of why; `passed_tests` and `seconds_each`. `heard` gets
        the same every few seconds.
    """
    logs = [folder / f"{number}.jsonl" for number in range(len(shards))]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors"]
    command += ["-p", __spec__.name]
    own = {PART: part, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # in each process, which are many already
    processes = [
        subprocess.Popen([*command, *arguments], cwd=ROOT, env=os.environ | own | {LOG: str(log)})
        for arguments, log in zip(shards, logs)
    ]
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        heard(read(logs))
    cut_off = [process for process in processes if process.poll() is None]
    for process in cut_off:
        process.kill()
        process.wait()
    found = read(logs)
    for number, process in enumerate(processes):
        if process.returncode not in (0, 1, 5) and process not in cut_off:  # passed, failed, no tests
            found["failures"][f"process {number}"] = f"exit status {process.returncode}"
    if cut_off:
        found["cut_off"] = len(cut_off)  # processes that were not through when the time was up
    heard(found)
    return found


def read(logs: Sequence[Path]) -> dict[str, Any]:
    """Reads what the hook has written so far."""
    written = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
    lines = [json.loads(line) for line in written if line.endswith("}")]  # but for one that is being written
    failures = {line["test"]: line["why"] for line in lines if line["outcome"] == "failed"}
    seconds = {line["test"]: line["seconds"] for line in lines if line["outcome"] == "passed"}
    return {**Counter(line["outcome"] for line in lines), "failures": failures, "each": seconds}


def main(arguments: list[str] | None = None) -> int:
    from qtuning_fast.bench.rows.command import Command  # as a plugin of pytest this module needs none of it

    line = Command(__spec__.name, __doc__, dry_run="one of forty shards, to see that it runs", deadline=True)
    line.add_argument("--part", choices=("all", "telling"), default="all", help="telling: few of those in float32")
    options = line.parse(arguments)
    results = line.results(options)
    count = REHEARSED_SHARDS if options.dry_run else SHARDS
    shards = [[*SIDE_BY_SIDE, "--shard", f"{number}/{count}"] for number in range(count)]
    parts = {"side by side": shards[:1] if options.dry_run else shards}
    if options.part == "all":
        parts["alone"] = [list(ALONE)]
    failed = 0
    for name, plan in parts.items():
        started = time.perf_counter()

        def heard(found: dict[str, Any], name: str = name, started: float = started) -> None:
            counts = found.get("passed", 0), len(found["failures"]), found.get("skipped", 0)
            summary = "{} passed, {} failed, {} skipped".format(*counts)
            results.add(name, found | {"summary": summary, "seconds": round(time.perf_counter() - started, 1)})

        with tempfile.TemporaryDirectory() as folder:
            found = run(plan, Path(folder), heard, part=options.part, deadline=options.deadline)
        failures, _ = found.pop("failures"), found.pop("each", None)
        print(f"{name}: {json.dumps(found)}", *failures.items(), sep="\n  ", flush=True)
        failed += len(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
