"""Triton's cache, made on one machine and carried to another, so that nothing has to be compiled there.

    python -m qtuning_fast.bench.plans.triton_cache                  writes runs/triton-cache.tar.xz
    python -m qtuning_fast.bench.plans.triton_cache --seconds FILE   only writes how long each kernel takes to compile

An entry of the cache is found by the contents of Triton's package (`triton_key`: the files of compiler, backends and
language, and libtriton.so, which differs between versions of Python), ptxas's version, the source of a kernel and of
everything it calls with line numbers, signature, constants and options, and by what the process has compiled before
(`settle`); not by paths or dates. But an entry lists its files by absolute path, so both machines keep the cache in the
same FOLDER. A launcher, which Triton compiles with a C compiler for each signature, is found by its source and the kind
of platform.
"""

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from qtuning_fast.bench.results import ROOT, digests

FOLDER = Path("/tmp/qtuning-fast-triton")
ARCHIVE, KEY = ROOT / "runs/triton-cache.tar.xz", "key.json"
KNOWN = ROOT / "bench/results/compile/triton-key.json"  # of the last Triton that a cache was made with
KEPT = (".json", ".cubin", ".so")  # what a process that launches reads; not what the compiler wrote on the way


def key() -> dict[str, Any]:
    """What decides whether an entry of the cache is found, in short."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    return {
        "triton": triton.__version__,
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": hashlib.sha256(get_ptxas_version(90).encode()).hexdigest(),
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "kernels": digests()["kernels"],
    }


def settle() -> None:
    """Makes each kernel's place in the cache the same in every process, whatever it compiles first.

    Triton's key of a function lists the constants of those that it calls as far as they are known by then: that is, as
    far as their own keys were asked for before (`DependenciesFinder._update_hash` in 3.6.0). So they are asked for
    once, in one order, before anything is compiled; else a process finds only part of what others compiled for it.
    """
    from qtuning_fast.kernels.target import INTERPRETED

    for path in sorted((ROOT / "kernels").glob("*.py")) if not INTERPRETED else ():
        functions = vars(importlib.import_module(f"qtuning_fast.kernels.{path.stem}"))
        for name in sorted(functions):
            getattr(functions[name], "cache_key", None)


def unpack() -> None:
    """Unpacks the archive into FOLDER, if there is one and it is not there yet, and makes FOLDER Triton's cache."""
    os.environ["TRITON_CACHE_DIR"] = str(FOLDER)
    if ARCHIVE.exists() and not (FOLDER / KEY).exists():
        started = time.monotonic()
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(FOLDER, filter="data")
        print(f"a Triton cache was unpacked in {time.monotonic() - started:.1f} s", flush=True)


def says() -> str:
    """A sentence that says whether the carried cache fits this machine's Triton and these kernels."""
    here, was_carried = key(), (FOLDER / KEY).exists()
    if not was_carried and not KNOWN.exists():
        return "no Triton cache was carried here"
    known = json.loads((FOLDER / KEY if was_carried else KNOWN).read_text())
    other = [name for name, value in here.items() if known.get(name, value) != value]
    what = "the Triton cache" if was_carried else "no Triton cache was carried here; the last one that was made"
    return f"{what} is of another {', '.join(other)}" if other else f"{what} fits this Triton"


def pack() -> int:
    """Packs FOLDER into the archive and records its key; returns the number of kernels and launchers."""
    (FOLDER / KEY).write_text(json.dumps(key(), indent=1) + "\n")
    of_triton = {name: value for name, value in key().items() if name != "kernels"}
    KNOWN.write_text(json.dumps(of_triton, indent=1) + "\n")
    files = [path for path in sorted(FOLDER.rglob("*")) if path.is_file() and path.suffix in KEPT]
    ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
    draft = ARCHIVE.with_suffix(".part")
    with tarfile.open(draft, "w:xz", preset=1) as archive:
        for path in files:
            archive.add(path, path.relative_to(FOLDER))
    draft.replace(ARCHIVE)
    return sum(path.suffix in (".cubin", ".so") for path in files)


def _stand_in() -> Path:
    """A folder with an empty libcuda.so.1, to link launchers with where there is no driver."""
    folder = Path(tempfile.mkdtemp())
    source = folder / "empty.c"
    source.write_text("")
    library = folder / "libcuda.so.1"
    command = [os.environ.get("CC", "gcc"), "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=Path, metavar="FILE", help="only write there how long it takes")
    options = parser.parse_args(arguments)
    from qtuning_fast.bench.plans.precompile import compile_kernels, timed

    os.environ.setdefault("TRITON_LIBCUDA_PATH", str(_stand_in()))
    if options.seconds:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
        options.seconds.write_text(json.dumps(timed(), indent=1) + "\n")
        return 0
    with suppress(FileNotFoundError):
        shutil.rmtree(FOLDER)
    os.environ["TRITON_CACHE_DIR"] = str(FOLDER)
    with suppress(ImportError):  # it is made, and without a driver it cannot be loaded
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()
    compile_kernels()
    count = pack()
    print(f"{count} kernels and launchers, {ARCHIVE.stat().st_size / 2**20:.1f} MiB: {ARCHIVE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
