"""The first minute on a GPU: what is installed, and whether each kernel is right.

    python -m qtuning_fast.bench.plans.smoke --out FILE

It records device, versions, compilers, tools and the carried Triton cache. Then it compares a training step of
BERT-base with float64, for each of our backends. Together they run every kernel: the forward kernel computes the
output, the kernel over queries the gradient of query, those over keys and of the prefix all other gradients; the
composed backend has its own kernels for the prefix. The exit status is 1 if the fused backend is wrong, because then
nothing else is worth measuring. A composed backend that fails is recorded.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from qtuning_fast.bench import shapes
from qtuning_fast.bench.accuracy import Errors, Reference, check, verdict
from qtuning_fast.bench.measure import default_device, default_dtype
from qtuning_fast.bench.peers import OURS, PEERS
from qtuning_fast.bench.plans import precompile, triton_cache
from qtuning_fast.bench.rows.command import Command
from qtuning_fast.bench.shapes import BERT_BASE, TINY, Shape
from qtuning_fast.bench.timing import first_line
from qtuning_fast.kernels.target import INTERPRETED

TOOLS = ("gcc", "ptxas", "nvcc", "ncu", "compute-sanitizer", "cuobjdump", "nvdisasm")
COMPILING = 25.0  # seconds after which kernels are compiled where they are called


def tools() -> dict[str, str]:
    """The version of each tool that is installed."""
    found = {}
    for tool in TOOLS:
        if path := shutil.which(tool):
            with suppress(OSError, subprocess.SubprocessError):
                said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=3).stdout
                lines = [line.strip() for line in said.splitlines()]
                found[tool] = next((line for line in lines if re.search(r"\d+\.\d+", line)), path)
    return found


def step(shape: Shape, backend: str, device: str) -> Errors:
    """The errors of a step's output and gradients against float64; raises what the kernels raise."""
    errors: Errors = {}
    reference = Reference(shape, shapes.inputs(shape, dtype=default_dtype(device), device=device))
    check(PEERS[backend], reference, errors, training=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return errors


def summary(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def main(arguments: list[str] | None = None) -> int:
    line = Command(__spec__.name, __doc__, dry_run="a tiny shape")
    options = line.parse(arguments)
    triton_cache.settle()
    started, device = time.perf_counter(), default_device()
    shape = TINY if options.dry_run else BERT_BASE
    results = line.results(options)
    cache = "nothing is compiled" if INTERPRETED else triton_cache.says()
    machine = {"cores": os.cpu_count(), "cache": cache, "key": {} if INTERPRETED else triton_cache.key()}
    results.add("machine", machine | {"summary": f"{results.heading()}, {cache}".replace("\n", ", ")})
    print(cache, flush=True)
    if device == "cuda" and not INTERPRETED:
        compiled: dict[str, Any] = {}
        until = time.monotonic() + COMPILING
        precompile.in_processes(precompile.of_kernels([shape]), until, lambda name, took: compiled.update({name: took}))
        results.add("compiled", {"summary": f"{len(compiled)} kernels", "each": compiled})
    wrong: dict[str, str] = {}
    for backend in OURS:
        try:
            errors = step(shape, backend, device)
            wrong[backend] = verdict(errors, default_dtype(device))
            results.add(backend, {"summary": f"{backend}, {shape.name}: {summary(errors)}", "errors": errors})
        except Exception as error:  # any error is a finding
            wrong[backend] = first_line(error)
            results.add(backend, {"summary": f"{backend}, {shape.name}: {first_line(error)}", "errors": {}})
        print(results.document["entries"][backend]["summary"], flush=True)
        status = "; ".join(f"{name}: {why}" for name, why in wrong.items() if why) or "all is right"
        seconds = round(time.perf_counter() - started, 1)
        # Written after each backend, so that the runner can decide even if the next one hangs.
        results.add("verdict", {"summary": status, "wrong": wrong["fused"], "seconds": seconds})
    found = tools()
    results.add("tools", {"summary": f"tools: {', '.join(found)}", "versions": found})
    print(found, flush=True)
    return 1 if wrong["fused"] else 0


if __name__ == "__main__":
    sys.exit(main())
