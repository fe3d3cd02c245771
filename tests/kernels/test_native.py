"""How the C++ kernels are compiled. How exact they are: tests/attention/test_accuracy.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qtuning_fast.kernels import native


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As in a new process, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="compiled on Linux only")
def test_a_machine_with_a_compiler_has_the_kernels():
    assert shutil.which("c++") is None or native.obstacle() is None


@pytest.mark.native
def test_they_are_compiled_once_and_kept(anew, monkeypatch):
    runs = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: runs.append(args) or run(*args, **kwargs))
    for _ in range(2):
        native._library.cache_clear()
        assert native.obstacle() is None
    assert [command[1] for command, *_ in runs].count("--version") == 2 and len(runs) == 3
    # What is there serves even if nothing can be added.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    native._library.cache_clear()
    assert native.obstacle() is None and len(runs) == 4
    [kept] = (anew / "cache" / "qtuning_fast").iterdir()  # and nothing half-made beside it
    assert kept.name.startswith("native-")


@pytest.mark.native
@pytest.mark.parametrize("home", ["a file", "open to others", "none"])
def test_without_a_cache_they_are_compiled_for_one_process(anew, monkeypatch, home):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    if home == "a file":
        (anew / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(anew / "file"))
    elif home == "open to others":
        folder = anew / "cache" / "qtuning_fast"
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", str(anew / "cache"))
        assert native.obstacle() is None and not list(folder.iterdir())
        return
    else:
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert native.obstacle() is None


@pytest.mark.skipif(sys.platform != "linux", reason="compiled on Linux only")
@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "no C.. compiler is found .* CXX"),
        ("echo; echo 'no such flag: -mavx2' >&2; exit 1", "does not compile its kernels: no such flag: -mavx2"),
        ("printf 'fehler: \\344' >&2; exit 1", "does not compile its kernels: fehler: \ufffd"),
        ("exit 3", "does not compile its kernels: no reason given"),
        ('for last; do :; done; case "$last" in *.so) echo nonsense > "$last"; esac', "do not load: .*"),
        ("sleep 9", "cannot be compiled by .* timed out"),
    ],
    ids=["none", "refuses", "speaks Latin-1", "silent", "makes nonsense", "hangs"],
)
def test_what_is_amiss_is_said(anew, monkeypatch, script, said):
    compiler = anew / "compiler"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    monkeypatch.setattr(native, "SECONDS", 2)
    with pytest.raises(NotImplementedError, match=said):
        native.forward(native.Call())


def test_elsewhere_than_on_linux_nothing_is_compiled(anew, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Linux" in native.obstacle()


@pytest.mark.native
@pytest.mark.thorough
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_vectors_compute_the_same(tmp_path, capability):
    """As PyTorch's own kernels do, they use no more than this environment variable allows."""
    code = """if True:
        import torch
        from qtuning_fast import prefix_attention
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 4, 37, 24, requires_grad=True) for _ in range(3))
        rows = [torch.randn(4, 7, 24, requires_grad=True) for _ in range(2)]
        mask = torch.randn(1, 4, 37, 37)
        found = []
        for backend in ("native", "reference"):
            o = prefix_attention(q, k, v, *rows, gate="gelu", gate_alpha=0.5, attn_mask=mask, window=(20, 9),
                                 softcap=5.0, backend=backend)
            found.append((o, *torch.autograd.grad(o.square().sum(), [q, k, v, *rows])))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        print(torch.backends.cpu.get_cpu_capability())
    """
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == {"default": "DEFAULT", "avx2": "AVX2"}[capability]
