"""Runs our kernels under Nsight Compute, if it is installed: utilization, occupancy, and what warps wait for.

    python -m qtuning_fast.bench.plans.counters --out FILE

The clocks of the GPU stay as they are. Nsight Compute replays each kernel for each group of counters, so that the times
here are not those of a run.
"""

import csv
import io
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import torch

from qtuning_fast.bench import shapes
from qtuning_fast.bench.measure import default_device, default_dtype
from qtuning_fast.bench.plans.passes import Pass
from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.results import ROOT
from qtuning_fast.bench.rows.command import Command
from qtuning_fast.bench.shapes import SHAPES, TINY
from qtuning_fast.kernels.blocks import blocks_for
from qtuning_fast.kernels.target import current_target

DIRECTIONS = ("forward", "queries", "keys", "merge")
MEASURED = ("bert-base", "llama-8b")
SECTIONS = (
    *("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats"),
    *("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats"),
)
SECONDS = 20.0  # of one shape: both fit into the step


def run_once(name: str) -> None:
    """Runs each direction once, then once more between the marks that Nsight Compute looks for."""
    shape, device = SHAPES[name], default_device()
    dtype = default_dtype(device)
    x = shapes.inputs(shape, dtype=dtype, device=device)
    settle()
    launches = []
    for direction in DIRECTIONS:
        entry = blocks_for(current_target(), dtype.itemsize, shape.D, direction)
        launches += Pass(shape, x, direction).launches(entry)
    for launch in launches:
        launch.run()
    if device != "cuda":
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for launch in launches:
        launch.run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def counted(program: str, name: str) -> dict[str, Any]:
    """The counters of each kernel by name, with their units."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    command = [program, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "details"]
    command += [*sections, sys.executable, "-m", __spec__.name, "--run", name]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"summary": f"{name}: not through after {SECONDS:.0f} s", "kernels": {}}
    kernels = read(ran.stdout)
    if not kernels:
        output = (ran.stdout + ran.stderr)[-5000:]
        return {"summary": f"{name}: exit status {ran.returncode}", "kernels": {}, "output": output}
    return {"summary": f"{name}: {', '.join(kernels)}", "kernels": kernels}


def read(text: str) -> dict[str, dict[str, str]]:
    """Reads the CSV of Nsight Compute, after lines of other programs."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, str]] = {}
    names: dict[str, str] = {}  # by number of the launch: a kernel may run twice
    for row in csv.DictReader(io.StringIO("\n".join(lines[begin:]))):
        if not row.get("Metric Name"):
            continue
        kernel = re.sub(r"\(.*", "", row["Kernel Name"])
        taken = sum(name.partition(" ")[0] == kernel for name in names.values())
        name = names.setdefault(row["ID"], f"{kernel} {taken + 1}" if taken else kernel)
        kernels.setdefault(name, {})[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return kernels


def main(arguments: list[str] | None = None) -> int:
    line = Command(__spec__.name, __doc__, dry_run="run the kernels once, on a tiny shape")
    line.add_argument("--run", choices=SHAPES, metavar="SHAPE", help="run only the kernels of this shape")
    options = line.parse(arguments)
    if options.run:
        run_once(options.run)
        return 0
    results, program = line.results(options), shutil.which("ncu")
    if options.dry_run:
        run_once(TINY.name)
    if program is None:
        results.add("none", {"summary": "ncu is not installed"})
        return 0
    for name in () if options.dry_run else MEASURED:
        started = time.perf_counter()
        results.add(name, counted(program, name) | {"seconds": round(time.perf_counter() - started, 1)})
        print(results.document["entries"][name]["summary"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
