"""Triton's cache, made on one machine and carried to another, so that nothing has to be compiled there.

    python -m qtuning_fast.bench.carried --seconds FILE      makes it: runs/triton-cache.tar.xz
    python -m qtuning_fast.bench.carried --says              whether it is of this Triton and of these kernels

What Triton finds in its cache depends on the contents of its own package (`triton_key`: the files of compiler, backends
and language, and libtriton.so, which is another one for each Python), ptxas's version, the source of a kernel and of
all it calls with their line numbers, signature, constants and options; on no path and no date. But an entry lists its
files by absolute path: so both machines keep the cache in the same FOLDER. A launcher, which Triton compiles by a C
compiler for each signature, is found by its source and the kind of platform.
"""

import argparse
import hashlib
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
KEPT = (".json", ".cubin", ".so")  # what a process that launches reads; not what the compiler wrote on the way


def key() -> dict[str, Any]:
    """Whatever decides whether an entry is found, in short."""
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


def unpack() -> None:
    """The archive to FOLDER, if there is one and it is not there yet; and Triton's cache is there from now on."""
    os.environ["TRITON_CACHE_DIR"] = str(FOLDER)
    if ARCHIVE.exists() and not (FOLDER / KEY).exists():
        started = time.monotonic()
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(FOLDER, filter="data")
        print(f"a Triton cache was unpacked in {time.monotonic() - started:.1f} s", flush=True)


def says() -> str:
    """Whether the cache that was carried is of this machine's Triton and of these kernels."""
    if not (FOLDER / KEY).exists():
        return "no Triton cache was carried here"
    carried, here = json.loads((FOLDER / KEY).read_text()), key()
    other = [name for name, value in here.items() if carried.get(name) != value]
    return f"the Triton cache is of another {', '.join(other)}" if other else "the Triton cache is this machine's"


def pack() -> int:
    """FOLDER into the archive; how many kernels and launchers."""
    (FOLDER / KEY).write_text(json.dumps(key(), indent=1) + "\n")
    files = [path for path in sorted(FOLDER.rglob("*")) if path.is_file() and path.suffix in KEPT]
    ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
    draft = ARCHIVE.with_suffix(".part")
    with tarfile.open(draft, "w:xz", preset=1) as archive:
        for path in files:
            archive.add(path, path.relative_to(FOLDER))
    draft.replace(ARCHIVE)
    return sum(path.suffix in (".cubin", ".so") for path in files)


def _stand_in() -> Path:
    """A folder with an empty libcuda.so.1, for launchers to be linked with where there is no driver."""
    folder = Path(tempfile.mkdtemp())
    source = folder / "empty.c"
    source.write_text("")
    library = folder / "libcuda.so.1"
    command = [os.environ.get("CC", "gcc"), "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--says", action="store_true", help="whether the carried cache fits here")
    parser.add_argument("--seconds", type=Path, metavar="FILE", help="write there how long each kernel took")
    options = parser.parse_args(arguments)
    if options.says:
        unpack()
        print(says())
        return 0
    from qtuning_fast.bench.ahead import compile_kernels

    with suppress(FileNotFoundError):
        shutil.rmtree(FOLDER)
    os.environ["TRITON_CACHE_DIR"] = str(FOLDER)
    os.environ.setdefault("TRITON_LIBCUDA_PATH", str(_stand_in()))
    with suppress(ImportError):  # it is made, and without a driver it cannot be loaded
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()
    found = compile_kernels()
    if options.seconds:
        options.seconds.write_text(json.dumps(found, indent=1) + "\n")
    count = pack()
    print(f"{count} kernels and launchers, {ARCHIVE.stat().st_size / 2**20:.1f} MiB: {ARCHIVE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
