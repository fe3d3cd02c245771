"""The first minute on a GPU: what is there, and whether each kernel computes what it should.

    python -m qtuning_fast.bench.plans.smoke --out FILE

Device, versions, compilers, tools and the carried Triton cache; then a training step of BERT-base by each of our
backends beside float64. Between them they run every kernel: the output is the forward kernel's, the gradient of query
the one over queries, all others those over keys and of the prefix; the composed backend has its own for the prefix.
Exits with 1 if the fused backend is wrong: then there is nothing else worth measuring. A composed one that fails is a
row that says so.
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
    """What each tool says of its version; those that are not there are left out."""
    found = {}
    for tool in TOOLS:
        if path := shutil.which(tool):
            with suppress(OSError, subprocess.SubprocessError):
                said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=3).stdout
                lines = [line.strip() for line in said.splitlines()]
                found[tool] = next((line for line in lines if re.search(r"\d+\.\d+", line)), path)
    return found


def step(shape: Shape, backend: str, device: str) -> Errors:
    """A step's output and gradients beside float64; raises what the kernels raise."""
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
        except Exception as error:  # whatever it is: it is what was to be found out
            wrong[backend] = first_line(error)
            results.add(backend, {"summary": f"{backend}, {shape.name}: {first_line(error)}", "errors": {}})
        print(results.document["entries"][backend]["summary"], flush=True)
        status = "; ".join(f"{name}: {why}" for name, why in wrong.items() if why) or "all is right"
        seconds = round(time.perf_counter() - started, 1)
        # After each backend: what the runner decides by is there, even if the next one hangs.
        results.add("verdict", {"summary": status, "wrong": wrong["fused"], "seconds": seconds})
    found = tools()
    results.add("tools", {"summary": f"tools: {', '.join(found)}", "versions": found})
    print(found, flush=True)
    return 1 if wrong["fused"] else 0


if __name__ == "__main__":
    sys.exit(main())
