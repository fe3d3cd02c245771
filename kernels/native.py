"""The C++ kernels in cpp/: how they are compiled, and the struct that they take.

They are compiled once for a machine, at first use, in a few seconds; the library is kept in the user's cache. A
compiler is asked for vectors as wide as PyTorch's own kernels use. Nothing needs a compiler: without one `obstacle`
says so, and other backends compute.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "cpp" / "native.cpp"
DEFINED = {"PADDED": 16, "CHUNK": 64}  # what native.cpp says of them
GATES = (None, "tanh", "sigmoid", "gelu", "relu", "softplus", "elu", "identity")  # by their numbers in gate.h
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
WIDER = {  # by what PyTorch's own kernels use on this CPU
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
SECONDS = 120  # after which a compiler is given up

_address, _integer = ctypes.c_void_p, ctypes.c_int64


class Rows(ctypes.Structure):
    """A float32 tensor [B, H, N, D] with contiguous columns."""

    _fields_ = [("data", _address), *((name, _integer) for name in ("batch", "head", "row"))]


class Overlay(ctypes.Structure):
    """A mask [B, H, N, M], bool or float32."""

    _fields_ = [("data", _address), *((name, _integer) for name in ("batch", "head", "row", "column", "is_bool"))]


class Side(ctypes.Structure):
    """The prefix's keys, or its values."""

    _fields_ = [
        *((name, _address) for name in ("rows", "U", "V", "folded", "parts", "d_rows", "d_U", "d_V")),
        *((name, _integer) for name in ("D", "R", "is_bank")),
    ]


# The fields of a sample, all of 64 bits.
SAMPLE = ("batch", "first_query", "N", "first_key", "M", "task", "length", "bias", "seen_from", "seen_to")


class Call(ctypes.Structure):
    """The arguments of both passes, as arguments.h describes them."""

    _fields_ = [
        *((name, Rows) for name in ("query", "key", "value", "output", "d_output", "d_query", "d_key", "d_value")),
        *((name, Overlay) for name in ("padding", "mask", "bias")),
        ("samples", _address),
        *((name, Side) for name in ("prefix_key", "prefix_value")),
        *((name, _address) for name in ("used", "lengths", "alpha", "tau", "sink", "lse", "rest")),
        *((name, _address) for name in ("alpha_parts", "tau_parts", "d_alpha", "d_tau")),
        *((name, _integer) for name in ("count", "rows", "Hq", "Hkv", "D", "Dv", "T", "P", "n_shared")),
        *((name, _integer) for name in ("before", "after")),
        *((name, _integer) for name in ("gate", "threads", "chunk", "lanes", "segments")),
        *((name, _integer) for name in ("forward_only", "context_gradients", "prefix_gradients")),
        *((name, _integer) for name in ("d_key_segment", "d_value_segment")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


def obstacle() -> str | None:
    """Return why there are no C++ kernels on this machine, or None. The first time it may compile them."""
    return _library()[1]


def fold(call: Call) -> None:
    """Write the folded rows of the prefixes in use, where they are reweighted."""
    _loaded().native_fold(ctypes.byref(call))


def forward(call: Call) -> None:
    """Write the output and the log-sum-exp."""
    _loaded().native_forward(ctypes.byref(call))


def backward(call: Call) -> None:
    """Write d_query; add to d_key and d_value, and to the parts of the gradients of folded rows, alpha and tau."""
    _loaded().native_backward(ctypes.byref(call))


def unfold(call: Call) -> None:
    """From the parts, add to the gradients of stored rows, U and V, and write those of alpha and tau."""
    _loaded().native_unfold(ctypes.byref(call))


def _loaded() -> ctypes.CDLL:
    library, why_not = _library()
    if library is None:
        raise NotImplementedError(why_not)
    return library


@cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    if sys.platform != "linux":
        return None, "its C++ kernels are compiled on Linux only"
    compiler: list[str] = []
    with suppress(ValueError):  # quotes that do not close
        compiler = shlex.split(os.environ.get("CXX") or "c++")
    if not compiler or shutil.which(compiler[0]) is None:
        return None, "no C++ compiler is found to compile its kernels: install g++, or name one in CXX"
    made_by = shlex.join(compiler)
    try:
        path = _compiled(compiler)
    except subprocess.CalledProcessError as error:
        return None, f"{made_by} does not compile its kernels: {_first_line(error.stderr)}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"its kernels cannot be compiled by {made_by}: {_first_line(str(error))}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"its kernels, compiled by {made_by}, do not load: {_first_line(str(error))}"
    library.native_size.restype = ctypes.c_int64
    if library.native_size() != ctypes.sizeof(Call):
        return None, f"its kernels, compiled by {made_by}, take other arguments than this version passes"
    return library, None


def _compiled(compiler: list[str]) -> Path:
    """Return the library, compiled by now.

    Its name tells what it was made of. It appears when it is complete, so that processes need not wait for each other.
    """
    defined = [f"-D{name}={value}" for name, value in DEFINED.items()]
    wider = WIDER.get(torch.backends.cpu.get_cpu_capability(), ())
    command = [*compiler, *FLAGS, *defined, *wider, str(SOURCE)]
    # PyTorch's own OpenMP, if it brings one: with a second one threads of both would wait in turns, each on a core.
    libraries = Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*")
    command += ["-Wl,--as-needed", *map(str, sorted(libraries))]
    texts = [path.read_text() for path in sorted([SOURCE, *SOURCE.parent.glob("*.h")])]
    made_of = "\0".join([*command, _run([*compiler, "--version"]), torch.__version__, *texts])
    name = f"native-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    folder = _cache(name)
    library = folder / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work, name)
            _run([*command, "-o", str(made)])
            made.replace(library)
    return library


def _run(command: list[str]) -> str:
    """Run a compiler and return what it prints."""
    result = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    return result.stdout


def _cache(name: str) -> Path:
    """Return the folder for a library: the user's cache, or one for this process.

    What others may write to is not trusted. A folder that cannot be written serves if the library is there.
    """
    with suppress(OSError, RuntimeError):  # no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "qtuning_fast")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        is_ours = status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if is_ours and ((folder / name).exists() or os.access(folder, os.W_OK)):
            return folder
    made = tempfile.TemporaryDirectory(prefix="qtuning_fast-")
    atexit.register(made.cleanup)
    return Path(made.name)


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "no reason given")
