"""Compiles what a plan is going to measure into the caches on disk, by many processes, the slowest first.

    python -m qtuning_fast.bench.plans.precompile --deadline SECONDS --out FILE

Peers under `torch.compile` come first, because they take half a minute each; then our kernels with their launchers,
then the blocks that tuning will try. A peer is compiled by running it once, so that these processes use the GPU, and
nothing may be timed beside them. They run at a low priority.
"""

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton

from qtuning_fast.bench import shapes
from qtuning_fast.bench.accuracy import prepare
from qtuning_fast.bench.measure import default_device, default_dtype
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.plans import plan, rank_backends
from qtuning_fast.bench.plans.candidates import candidates, compile_for
from qtuning_fast.bench.plans.durations import FLEX, KERNEL, LAUNCHER
from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.plans.tune import DTYPES, asked, in_order, incumbent_of, shapes_of
from qtuning_fast.bench.predictions import compile_report
from qtuning_fast.bench.predictions.compile_report import AbsentDriver
from qtuning_fast.bench.results import versions
from qtuning_fast.bench.rows.command import Command
from qtuning_fast.bench.shapes import SHAPES, Shape
from qtuning_fast.bench.timing import first_line
from qtuning_fast.kernels.target import INTERPRETED

COMPILED = ("flex-frozen-gate", "flex-merged", "flex-approx-frozen-gate", "flex", "eager-compiled")
NICENESS = 10
SHARED = 0.05  # seconds: a kernel that another shape has compiled already
MOST_LAUNCHES = 8  # of a step, and of what composed adds to it
SM_90 = "sm_90"  # the target of the plans


class Wanted(NamedTuple):
    """One thing to compile."""

    name: str
    seconds: float  # that are expected of it, on one core
    make: Callable[[], Any]
    needs_no_gpu: bool = False  # whether it has no GPU to wait for, and makes way for those that have


def wanted(plan_name: str) -> list[Wanted]:
    """What a plan runs, the most important first."""
    if plan_name == "gpu-drop-in":
        peers = of_peers(plan.DROP_IN, plan.DROP_IN_PEERS, COMPILED)
        return [*peers, *of_kernels([SHAPES[name] for name in plan.DROP_IN])]
    if plan_name == "gpu-second":
        long = [SHAPES[name] for name in plan.LONG]
        peers = of_peers(plan.LONG, plan.LONG_PEERS, COMPILED)
        return [*peers, *of_kernels((*long, *rank_backends.training_shapes("cuda")))]
    shapes_run = (*plan.SHAPES, *plan.DECODING)
    first = [*of_peers(plan.SHAPES, plan.PEERS, COMPILED), *of_peers(shapes_run, plan.PEERS, plan.OURS)]
    return [
        *first,
        *of_candidates(),
        *of_peers(*plan.GATE_TRAINED, COMPILED),
        *of_peers(plan.LONG, plan.LONG_PEERS, COMPILED),
    ]


def of_peers(names: Sequence[str], peers: Sequence[str], chosen: Collection[str]) -> list[Wanted]:
    """The chosen peers of some shapes, which are compiled by running them once."""
    return [
        Wanted(
            f"{name}: {peer}",
            FLEX if peer in COMPILED else 4 * (KERNEL + LAUNCHER),
            partial(compile_peer, SHAPES[name], peer),
        )
        for name in names
        for peer in peers
        if peer in chosen
    ]


def of_kernels(on_shapes: Sequence[Shape]) -> list[Wanted]:
    """Each launch of a step of each shape, with its launcher."""
    return [
        Wanted(
            f"{shape.name}: launch {number}",
            KERNEL + LAUNCHER,
            partial(compile_kernel, SM_90, shape, number),
            needs_no_gpu=True,
        )
        for shape in on_shapes
        for number in range(MOST_LAUNCHES)
    ]


def of_candidates() -> list[Wanted]:
    """The blocks that tuning tries, the most promising of each job first."""
    jobs = asked(["bf16"], plan.TUNED_HEAD_SIZES, plan.TUNED_DIRECTIONS)
    tried = [(job, in_order(candidates(incumbent_of(SM_90, job)))) for job in jobs]
    found = []
    for rank in range(max(len(entries) for _, entries in tried)):
        for job, entries in tried:
            if rank < len(entries):
                on = shapes_of(job.head_size, job.direction)
                make = partial(compile_for, SM_90, DTYPES[job.dtype], entries[rank], on)
                found.append(Wanted(f"{job}: {rank}", KERNEL * len(on), make, needs_no_gpu=True))
    return found


def compile_peer(shape: Shape, peer: str) -> None:
    """Runs a peer once. If it fails, it fails again when it is measured, and is reported then."""
    with suppress(Exception):
        x = shapes.inputs(shape, dtype=default_dtype("cuda"), device="cuda")
        prepared = prepare(PEERS[peer], shape, x, training=shape.trained)
        prepared.step(x.d_output) if shape.trained else prepared.forward()


def compile_kernel(target: str, shape: Shape, number: int) -> dict[str, float]:
    """Compiles one launch of a shape without a GPU; returns the seconds of a core for the kernel and its launcher."""
    triton.runtime.driver.set_active(AbsentDriver(target))
    launches = list(_launches(shape))
    if number >= len(launches):
        return {}
    _, launch = launches[number]
    started = _core_seconds()
    compiled = launch.compile()
    seconds = {"kernel": round(_core_seconds() - started, 2)}
    # Without CUDA's library there is nothing to link with; other Tritons make launchers in other ways.
    with suppress(ImportError, AssertionError, OSError, AttributeError):
        from triton.backends.nvidia.driver import CudaLauncher

        started = _core_seconds()
        try:
            CudaLauncher(compiled.src, compiled.metadata)
        finally:  # linked with a stand-in for CUDA's library it is made, and cannot be loaded
            seconds["launcher"] = round(_core_seconds() - started, 2)
    return seconds


def _core_seconds() -> float:
    """Seconds of a core that this process and its children have used."""
    return sum(os.times()[:4])


def _launches(shape: Shape) -> Iterator[tuple[str, Any]]:
    dtype = torch.bfloat16
    return iter(list(compile_report.launches(shapes.inputs(shape, dtype=dtype, device="meta").call(shape))))


def timed() -> dict[str, Any]:
    """Compile times of the kernels and launchers of the plan's shapes, one after the other on one core."""
    _start()
    each = {job.name: job.make() for job in of_kernels([SHAPES[name] for name in plan.SHAPES])}
    new = {name: seconds for name, seconds in each.items() if seconds.get("kernel", 0.0) > SHARED}
    return {"versions": versions(), "each": new}


def compile_kernels(deadline: float = math.inf) -> dict[str, Any]:
    """Compiles all kernels of ours that both plans run, without a GPU; returns their times or errors."""
    found: dict[str, Any] = {}
    shapes_run = [SHAPES[name] for name in (*plan.SHAPES, *plan.DECODING)]
    own = [each for each in (*wanted("gpu"), *wanted("gpu-second")) if each.needs_no_gpu]
    in_processes([*of_kernels(shapes_run), *own], deadline, lambda name, said: found.update({name: said}))
    return found


def in_processes(jobs: Sequence[Wanted], deadline: float, heard: Callable[[str, Any], None]) -> bool:
    """Runs the jobs until the deadline and passes on each result or error. Returns whether all were done by then."""
    workers = os.cpu_count() or 1
    own = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}  # in each process, which are many already
    spawn = multiprocessing.get_context("spawn")  # a process that was forked has no CUDA
    with patch.dict(os.environ, own), spawn.Pool(workers, _start) as pool:
        waiting = {job.name: pool.apply_async(_make, (job.make, job.needs_no_gpu)) for job in jobs}
        while waiting and time.monotonic() < deadline:
            for name in [name for name, result in waiting.items() if result.ready()]:
                try:
                    heard(name, waiting.pop(name).get())
                except Exception as error:  # whatever a compiler may raise
                    heard(name, {"error": first_line(error)})
            time.sleep(0.05)
    return not waiting  # the pool ends those that are not done by then


def _start() -> None:
    torch.set_num_threads(1)
    settle()


def _make(make: Callable[[], Any], needs_no_gpu: bool) -> Any:
    if needs_no_gpu and os.nice(0) < NICENESS:
        os.nice(NICENESS)
    if not needs_no_gpu and torch.cuda.is_available():
        triton.runtime.driver.reset_active()  # what was compiled before may have been for a GPU that is not there
    return make()


def command() -> Command:
    """The command line."""
    found = Command(__spec__.name, __doc__, dry_run="compile one kernel", deadline=True)
    found.add_argument("--plan", choices=("gpu", "gpu-second", "gpu-drop-in"), default="gpu")
    return found


def main(arguments: list[str] | None = None) -> int:
    line = command()
    options = line.parse(arguments)
    results = line.results(options)
    jobs = [job for job in wanted(options.plan) if job.needs_no_gpu or default_device() == "cuda"]
    if options.dry_run:
        jobs = [] if INTERPRETED else [job for job in jobs if job.needs_no_gpu][:1]
    started, done = time.monotonic(), dict[str, Any]()

    def heard(name: str, said: Any) -> None:
        done[name] = said or {}
        results.add("compiled", {"jobs": len(jobs), "summary": f"{len(done)} of {len(jobs)} compiled", "each": done})

    in_processes(jobs, options.deadline, heard)
    print(f"{len(done)} of {len(jobs)} compiled in {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
