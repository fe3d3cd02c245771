"""What is compiled ahead, in which order, and by how many processes."""

import os
import time
from functools import partial

from qtuning_fast.bench.plans import plan, precompile
from qtuning_fast.bench.plans.precompile import COMPILED, Wanted, in_processes, wanted
from qtuning_fast.bench.shapes import SHAPES


def test_what_takes_longest_and_is_measured_first_is_compiled_first():
    names = [job.name for job in wanted("gpu")]
    flex = [peer for peer in plan.PEERS if peer in COMPILED]
    assert names[: len(flex)] == [f"bert-base: {peer}" for peer in flex] and len(set(names)) == len(names)
    assert names.index("minilm: flex-merged") < names.index("bert-base: fused") < names.index("bf16 D64 keys: 0")
    first = [name for name in names if name.startswith("bf16")][:7]
    assert {name.rsplit(": ", 1)[1] for name in first} == {"0"}  # a candidate of each job before the next of any
    assert {"long: flex-frozen-gate", "N512 causal: launch 0"} <= {job.name for job in wanted("gpu-second")}
    drop_in = {job.name for job in wanted("gpu-drop-in")}
    assert {"bert-base-packed: flex-frozen-gate", "mistral-8k: launch 0"} <= drop_in


def test_peers_are_run_on_the_gpu_and_kernels_need_none():
    alone = {job.needs_no_gpu for job in wanted("gpu") if job.name.startswith("bf16")}
    assert alone == {True} and not any(job.needs_no_gpu for job in wanted("gpu") if ": fused" in job.name)
    precompile.compile_peer(SHAPES["tiny"], "eager")  # without a GPU it fails, and is not heard of


def _fails():
    raise ValueError("no\nmore")


def test_who_runs_on_the_gpu_has_the_driver_that_is_there(monkeypatch):
    reset = []
    monkeypatch.setattr(precompile.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precompile.triton.runtime.driver, "reset_active", lambda: reset.append(True))
    monkeypatch.setattr(precompile.os, "nice", lambda more: 0)
    assert precompile._make(partial(sum, [1, 2]), True) == 3 and not reset
    assert precompile._make(partial(sum, [1, 2]), False) == 3 and reset


def test_each_job_is_heard_of_and_whoever_is_not_done_in_time_is_ended():
    heard, started = {}, time.monotonic()
    jobs = [Wanted("sum", 1.0, partial(sum, [1, 2])), Wanted("fails", 1.0, _fails)]
    jobs += [Wanted("nice", 1.0, partial(os.nice, 0), needs_no_gpu=True)]
    assert in_processes(jobs, time.monotonic() + 60, heard.__setitem__)
    assert heard == {"sum": 3, "fails": {"error": "ValueError: no"}, "nice": precompile.NICENESS}
    heard.clear()
    assert not in_processes([Wanted("sleeps", 1.0, partial(time.sleep, 60))], time.monotonic() + 1, heard.__setitem__)
    assert not heard and time.monotonic() - started < 50
