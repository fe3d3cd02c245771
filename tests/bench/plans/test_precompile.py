"""What is compiled ahead, in which order, by how many; and Triton's cache that travels."""

import json
import os
import subprocess
import sys
import tarfile
import time
from functools import partial

import pytest

from qtuning_fast.bench.plans import plan, precompile, triton_cache
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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, in a folder of its own, of a Triton that says what the test says."""
    monkeypatch.setattr(triton_cache, "FOLDER", tmp_path / "triton")
    monkeypatch.setattr(triton_cache, "ARCHIVE", tmp_path / "runs/cache.tar.xz")
    monkeypatch.setattr(triton_cache, "KNOWN", tmp_path / "known.json")
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    here = {"triton": "3.6.0", "triton_key": "abc", "kernels": "1"}
    monkeypatch.setattr(triton_cache, "key", lambda: dict(here))
    entry = triton_cache.FOLDER / "KEY"
    entry.mkdir(parents=True)
    for name in ("kernel.cubin", "kernel.json", "__grp__kernel.json", "kernel.ttgir", "kernel.ptx", "launcher.so"):
        (entry / name).write_text(name)
    return here


def test_a_cache_holds_what_a_launch_reads_and_nothing_else(cache):
    assert triton_cache.pack() == 2
    with tarfile.open(triton_cache.ARCHIVE) as archive:
        names = {name.rpartition("/")[2] for name in archive.getnames()}
    assert names == {"kernel.cubin", "kernel.json", "__grp__kernel.json", "launcher.so", "key.json"}


def test_a_cache_that_was_carried_says_whether_it_is_of_this_triton(cache, tmp_path):
    assert triton_cache.says() == "no Triton cache was carried here"
    triton_cache.pack()
    assert json.loads(triton_cache.KNOWN.read_text()) == {"triton": "3.6.0", "triton_key": "abc"}
    triton_cache.FOLDER.joinpath("key.json").unlink()
    assert triton_cache.says() == "no Triton cache was carried here; the last one that was made fits this Triton"
    triton_cache.FOLDER.rename(tmp_path / "away")
    triton_cache.unpack()
    assert os.environ["TRITON_CACHE_DIR"] == str(triton_cache.FOLDER)
    assert (
        triton_cache.FOLDER / "KEY/kernel.cubin"
    ).exists() and triton_cache.says() == "the Triton cache fits this Triton"
    cache |= {"triton_key": "abd", "kernels": "2"}
    assert triton_cache.says() == "the Triton cache is of another triton_key, kernels"
    json.dumps(triton_cache.key())


def test_without_an_archive_the_cache_still_has_its_fixed_place(cache):
    triton_cache.unpack()
    assert os.environ["TRITON_CACHE_DIR"] == str(triton_cache.FOLDER)


@pytest.mark.thorough
def test_kernels_and_their_launchers_are_found_again_by_content(tmp_path):
    """By another process, in another order; with a stand-in for CUDA's library where there is none."""
    code = """
import os, sys
from qtuning_fast.bench.plans import triton_cache as carried
os.environ.setdefault("TRITON_LIBCUDA_PATH", str(carried._stand_in()))
from qtuning_fast.bench.plans.precompile import compile_kernel
from qtuning_fast.bench.shapes import SHAPES
carried.settle()
for number in map(int, sys.argv[1:]):
    compile_kernel("sm_90", SHAPES["bert-base"], number)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(triton_cache.ROOT)}

    def files(*numbers):
        command = [sys.executable, "-c", code, *map(str, numbers)]
        subprocess.run(command, env=environment, check=True, cwd=triton_cache.ROOT)
        return {path for path in tmp_path.rglob("*") if path.suffix in (".cubin", ".so")}

    first = files(0, 1, 5, 6)
    assert sum(path.suffix == ".cubin" for path in first) == 4 and files(6, 5, 1, 0) == first
