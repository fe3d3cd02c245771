"""Compiles what a plan is going to measure, by many processes, into the caches on disk: the slowest first.

    python -m qtuning_fast.bench.ahead --deadline SECONDS --out FILE

Peers under `torch.compile` come first, for they take half a minute each, then our kernels with their launchers, then
the blocks that tuning will try. Peers are compiled by being run once, so these processes have memory of the GPU, and
nothing is to be timed beside them. They make way for whatever else the machine has to do.
"""

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from qtuning_fast.bench import compile_report, plan, shapes
from qtuning_fast.bench.accuracy import prepare
from qtuning_fast.bench.candidates import candidates, compile_for
from qtuning_fast.bench.compile_report import AbsentDriver
from qtuning_fast.bench.measure import default_device, default_dtype
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.results import RUNS, Results
from qtuning_fast.bench.shapes import SHAPES, Shape
from qtuning_fast.bench.timing import first_line
from qtuning_fast.bench.tune import DTYPES, Job, incumbent_of
from qtuning_fast.bench.tune import SHAPES as TUNED_ON
from qtuning_fast.kernels.target import INTERPRETED

COMPILED = ("flex-frozen-gate", "flex-merged", "flex-approx-frozen-gate", "flex", "eager-compiled")
NICENESS = 10
MOST_LAUNCHES = 6  # of a step, and of what composed adds to it
SM_90 = "sm_90"  # the target of the plans
Jobs = dict[str, Callable[[], Any]]


def of_peers(names: tuple[str, ...], peers: tuple[str, ...]) -> Jobs:
    """Shapes and peers under `torch.compile`, in the order in which they will be measured."""
    return {f"{shape}: {peer}": partial(compile_peer, SHAPES[shape], peer) for shape in names for peer in peers}


def of_kernels(target: str, names: tuple[str, ...]) -> Jobs:
    """Each launch of each shape, with what starts it."""
    found: Jobs = {}
    triton.runtime.driver.set_active(AbsentDriver(target))
    for name in names:
        for number, (kernel, _) in enumerate(_launches(SHAPES[name])):
            found[f"{name}: {kernel}"] = partial(compile_kernel, target, SHAPES[name], number)
    return found


def of_kernels_elsewhere(target: str, shape: Shape) -> Jobs:
    """Likewise of one shape; the driver of this process stays what it is."""
    return {f"launch {number}": partial(compile_kernel, target, shape, number) for number in range(MOST_LAUNCHES)}


def of_candidates(target: str) -> Jobs:
    """Blocks that tuning tries, the most promising of each job first."""
    asked = [Job("bf16", D, direction) for D in plan.TUNED_HEAD_SIZES for direction in plan.TUNED_DIRECTIONS]
    tried = [(job, candidates(incumbent_of(target, job))) for job in asked]
    found: Jobs = {}
    for rank in range(max(len(entries) for _, entries in tried)):
        for job, entries in tried:
            if rank < len(entries):
                compiled = partial(compile_for, target, DTYPES[job.dtype], entries[rank], TUNED_ON[job.head_size])
                found[f"{job}: {rank}"] = compiled
    return found


def compile_peer(shape: Shape, peer: str) -> None:
    """Runs it once; who fails does so again when it is measured, and is reported then."""
    with suppress(Exception):
        x = shapes.inputs(shape, dtype=default_dtype("cuda"), device="cuda")
        prepared = prepare(PEERS[peer], shape, x, training=shape.trained)
        prepared.step(x.d_output) if shape.trained else prepared.forward()


def compile_kernel(target: str, shape: Shape, number: int) -> dict[str, float]:
    """One launch of a shape, for a GPU that need not be there; the seconds of the kernel and of its launcher."""
    triton.runtime.driver.set_active(AbsentDriver(target))
    launches = list(_launches(shape))
    if number >= len(launches):
        return {}
    _, launch = launches[number]
    started = time.perf_counter()
    compiled = launch.compile()
    seconds = {"kernel": round(time.perf_counter() - started, 2)}
    with suppress(ImportError, AssertionError, OSError):  # without CUDA's library there is nothing to link with
        from triton.backends.nvidia.driver import CudaLauncher

        started = time.perf_counter()
        try:
            CudaLauncher(compiled.src, compiled.metadata)
        finally:  # linked with a stand-in for CUDA's library it is made, and cannot be loaded
            seconds["launcher"] = round(time.perf_counter() - started, 2)
    return seconds


def _launches(shape: Shape) -> Iterator[tuple[str, Any]]:
    dtype = torch.bfloat16
    return iter(list(compile_report.launches(shapes.inputs(shape, dtype=dtype, device="meta").call(shape))))


def compile_kernels(target: str, *, deadline: float) -> dict[str, Any]:
    """All kernels that the plans run, and those that tuning tries: what each took, or its error."""
    names = (*plan.SHAPES, *plan.DECODING, *plan.LONG)
    found: dict[str, Any] = {}
    work = of_kernels(target, names) | of_candidates(target)
    in_processes(work, deadline, lambda name, said: found.update({name: said}))
    return found


def in_processes(jobs: Jobs, deadline: float, heard: Callable[[str, Any], None]) -> bool:
    """Runs jobs until the deadline; hands on what each returns, or its error. Whether all were done by then."""
    workers = os.cpu_count() or 1
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}  # in each process, which are many already
    with patch.dict(os.environ, alone), multiprocessing.get_context("spawn").Pool(workers, _make_way) as pool:
        waiting = {name: pool.apply_async(job) for name, job in jobs.items()}
        while waiting and time.monotonic() < deadline:
            for name in [name for name, result in waiting.items() if result.ready()]:
                try:
                    heard(name, waiting.pop(name).get())
                except Exception as error:  # whatever a compiler may raise
                    heard(name, {"error": first_line(error)})
            time.sleep(0.05)
    return not waiting  # who is not done by then is ended


def _make_way() -> None:
    os.nice(NICENESS)
    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, default=math.inf, help="on the clock of time.monotonic()")
    parser.add_argument("--dry-run", action="store_true", help="one kernel only, to see that all is there")
    parser.add_argument("--out", type=Path, default=RUNS / "ahead.json", metavar="FILE")
    options = parser.parse_args(arguments)
    device = default_device()
    results = Results("ahead", options.out, device, sys.argv[1:] if arguments is None else arguments)
    jobs: Jobs = {}
    if device == "cuda" and not options.dry_run:
        compiled = tuple(peer for peer in plan.PEERS if peer in COMPILED)
        jobs |= of_peers(plan.SHAPES, compiled) | of_peers(plan.SHAPES + plan.DECODING, plan.OURS_COMPILED)
    if not INTERPRETED:
        kernels = of_kernels(SM_90, (*plan.SHAPES, *plan.DECODING, *plan.LONG))
        jobs |= dict(list(kernels.items())[:1]) if options.dry_run else kernels | of_candidates(SM_90)
    started, done = time.monotonic(), dict[str, Any]()

    def heard(name: str, said: Any) -> None:
        done[name] = said or {}
        results.add("compiled", {"jobs": len(jobs), "said": f"{len(done)} of {len(jobs)} jobs", "each": done})

    finished = in_processes(jobs, options.deadline, heard)
    print(f"{len(done)} of {len(jobs)} compiled in {time.monotonic() - started:.0f} s", flush=True)
    return 0 if finished else 1


if __name__ == "__main__":
    sys.exit(main())
