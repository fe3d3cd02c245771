"""Runs small training steps under compute-sanitizer, if it is installed: accesses out of bounds, and races.

    python -m qtuning_fast.bench.plans.memcheck --out FILE

The steps first run without a tool, so that their kernels are compiled before a tool slows everything down; then under
all tools at the same time.
"""

import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import torch

from qtuning_fast.bench import shapes
from qtuning_fast.bench.accuracy import prepare
from qtuning_fast.bench.measure import default_device, default_dtype
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.results import ROOT
from qtuning_fast.bench.rows.command import Command
from qtuning_fast.bench.shapes import Shape

TOOLS = ("memcheck", "racecheck")
SECONDS, PLAIN_SECONDS = 100.0, 40.0  # of one tool, and without any
LAST_SECONDS = 2.0  # before the deadline, to write what there is
# Odd in all that blocks divide, grouped heads, several tasks.
SMALL = {
    "padded": Shape("padded", B=3, Hq=4, Hkv=2, N=77, D=64, P=37, padding=0.25),
    "causal": Shape("causal", B=2, Hq=4, Hkv=2, N=77, D=128, P=37, is_causal=True),
    "tasks": Shape("tasks", B=4, Hq=2, Hkv=2, N=33, D=32, P=13, tasks=3),
}


def sanitized(names: Sequence[str], deadline: float = math.inf) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs steps of some small shapes under each tool; yields what a tool says and whether that is `fine`.

    A tool counts no errors of a step that never ran, so only exit status 0 is fine.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        yield from ((tool, {"summary": f"{tool}: compute-sanitizer is not installed", "fine": True}) for tool in TOOLS)
        return
    step = [sys.executable, "-m", __spec__.name, "--step", *names]
    yield "plain", _ran("plain", step, min(deadline, time.monotonic() + PLAIN_SECONDS))
    with ThreadPoolExecutor() as pool:
        command = {tool: [program, "--tool", tool, "--print-limit", "20", *step] for tool in TOOLS}
        running = {pool.submit(_ran, tool, command[tool], deadline): tool for tool in TOOLS}
        for future in as_completed(running):
            yield running[future], future.result()


def _ran(tool: str, command: Sequence[str], deadline: float) -> dict[str, Any]:
    started, limit = time.monotonic(), min(SECONDS, max(deadline - time.monotonic(), 1.0))
    # PyTorch's own allocator would hide what lies beyond a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"summary": f"{tool}: not through after {limit:.0f} s", "fine": False}
    text = ran.stdout + ran.stderr
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    words = [*summary[-1:], *([f"exit status {ran.returncode}"] if ran.returncode or not summary else [])]
    errors = bool(summary) and not any(none in summary[-1] for none in (": 0 errors", ": 0 hazards"))
    found = {
        "summary": f"{tool}: {', '.join(words)}",
        "exit_status": ran.returncode,
        "fine": not (ran.returncode or errors),
    }
    return found | {"output": text[-20000:], "seconds": round(time.monotonic() - started, 1)}


def steps(names: Sequence[str]) -> None:
    """A training step of each of these shapes."""
    settle()
    device = default_device()
    for name in names:
        x = shapes.inputs(SMALL[name], dtype=default_dtype(device), device=device)
        prepare(PEERS["fused"], SMALL[name], x, training=True).step(x.d_output)
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    line = Command(__spec__.name, __doc__, dry_run="with the tools that are installed", deadline=True)
    line.add_argument("--step", nargs="+", choices=SMALL, metavar="NAME", help="run only the steps of these shapes")
    options = line.parse(arguments)
    if options.step:
        steps(options.step)
        return 0
    results = line.results(options)
    for tool, found in sanitized(list(SMALL), options.deadline - LAST_SECONDS):
        results.add(tool, found)
        print(found["summary"], flush=True)
    return 0 if all(found["fine"] for found in results.document["entries"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
