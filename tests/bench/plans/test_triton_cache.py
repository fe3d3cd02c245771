"""Triton's cache travels: it holds what a launch reads, and says whether it fits."""

import json
import os
import subprocess
import sys
import tarfile

import pytest

from qtuning_fast.bench.plans import triton_cache


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
