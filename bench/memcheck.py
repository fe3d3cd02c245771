"""A small training step under compute-sanitizer, where that is installed: reads and writes out of bounds, and races.

python -m qtuning_fast.bench.memcheck --out FILE
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from qtuning_fast.bench import shapes
from qtuning_fast.bench.accuracy import prepare
from qtuning_fast.bench.carried import settle
from qtuning_fast.bench.measure import default_device
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.results import ROOT, RUNS, Results
from qtuning_fast.bench.shapes import Shape

TOOLS = ("memcheck", "racecheck")
SECONDS = 100.0  # of one tool
# Odd in all that blocks divide, grouped heads, several tasks.
SMALL = {
    "padded": Shape("padded", B=3, Hq=4, Hkv=2, N=77, D=64, P=37, padding=0.25),
    "causal": Shape("causal", B=2, Hq=4, Hkv=2, N=77, D=128, P=37, is_causal=True),
    "tasks": Shape("tasks", B=4, Hq=2, Hkv=2, N=33, D=32, P=13, tasks=3),
}


def sanitized(tool: str, names: Sequence[str]) -> dict[str, str]:
    """What a tool says of steps of some of the small shapes."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"said": f"{tool}: compute-sanitizer is not installed"}
    # PyTorch's own allocator would hide what lies beyond a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--print-limit", "20", sys.executable, "-m", __spec__.name, "--step", *names]
    try:
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"said": f"{tool}: not through after {SECONDS:.0f} s"}
    text = ran.stdout + ran.stderr
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    return {"said": f"{tool}: {summary[-1] if summary else f'exit status {ran.returncode}'}", "output": text[-20000:]}


def steps(names: Sequence[str]) -> None:
    settle()
    device = default_device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for name in names:
        x = shapes.inputs(SMALL[name], dtype=dtype, device=device)
        prepare(PEERS["fused"], SMALL[name], x, training=True).step(x.d_output)
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", nargs="+", choices=SMALL, metavar="NAME", help="only the step: what is sanitized")
    parser.add_argument("--dry-run", action="store_true", help="whatever is there of it")
    parser.add_argument("--out", type=Path, default=RUNS / "memcheck.json", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.step:
        steps(options.step)
        return 0
    results = Results("memcheck", options.out, default_device(), sys.argv[1:] if arguments is None else arguments)
    fine = True
    for tool in TOOLS:
        started = time.perf_counter()
        found = sanitized(tool, list(SMALL))
        results.add(tool, found | {"seconds": round(time.perf_counter() - started, 1)})
        print(found["said"], flush=True)
        fine = fine and any(words in found["said"] for words in (" 0 errors", " 0 hazards", "not installed"))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
