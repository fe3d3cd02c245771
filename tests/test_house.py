"""The rules of the house that no linter checks."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRAWING = {"plots.py", "plot_style.py", "page.py"}  # themselves imported only where a report is written
# Parameters are renamed, so what a model can do is found by running it. Who reads signatures all the same, and why:
READING_SIGNATURES = {
    "cli.py": "its own commands', to put the options of the settings behind theirs",
    "attention/api.py": "its own function's, to bind arguments",
    "attention/composed/vendors/packages.py": "an interface of flash-attn 4, which needs its GPU",
    "integrations/transformers/positions.py": "a stack's, to read a call's positional arguments; nothing is decided",
}
LAZY_ONLY = {"datasets", "sklearn", "matplotlib"}  # heavy, or absent from some machines


def imported(path: Path, *, at_load: bool) -> set[str]:
    """Names of top-level packages that a file imports; with `at_load` only what runs when the module is imported."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree)
    if at_load:
        nodes = iter([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))])
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:  # a relative import stays in the package
            names.add((node.module or "").split(".")[0])
    return names


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # -P would hide the very folder that the checks are about: the checkout's root.
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_kernels_know_nothing_of_the_package() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        assert imported(path, at_load=False) <= {"torch", "triton", "__future__", *sys.stdlib_module_names}, path


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    for path in (ROOT / "qtuning_fast").rglob("*.py"):
        if path.name not in DRAWING:
            assert not imported(path, at_load=True) & {*LAZY_ONLY, "triton"}, path


def test_signatures_are_read_only_where_there_is_a_reason() -> None:
    package = ROOT / "qtuning_fast"
    words = re.compile(r"\b(signature\(|getfullargspec|co_varnames|import signature)")
    reading = {
        str(path.relative_to(package if folder == package else ROOT))
        for folder in (package, ROOT / "bench", ROOT / "kernels")
        for path in folder.rglob("*.py")
        if words.search(path.read_text())
    }
    assert reading == READING_SIGNATURES.keys()


def test_kernels_and_bench_are_subpackages_from_a_bare_checkout() -> None:
    result = run_python(
        "import qtuning_fast.kernels, qtuning_fast.bench; print(list(qtuning_fast.kernels.__path__))", PYTHONPATH="."
    )
    assert result.returncode == 0, result.stderr
    assert "kernels" in result.stdout


def test_the_name_kernels_stays_free_for_its_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    result = run_python("import kernels; print(kernels.__file__)")
    assert "site-packages" in result.stdout, result.stderr


def test_the_operator_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import importlib.util, importlib.machinery
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from qtuning_fast import prefix_attention
q, p = torch.randn(1, 2, 3, 4), torch.randn(2, 5, 4)
assert prefix_attention(q, q, q, p, p).shape == (1, 2, 3, 4)
try:
    prefix_attention(q, q, q, p, p, backend="fused")
except NotImplementedError as error:
    print(error)
"""
    result = run_python(code, PYTHONPATH=".")
    assert result.returncode == 0, result.stderr
    assert "triton is not installed" in result.stdout


def test_reports_are_loaded_only_where_one_is_written() -> None:
    result = run_python("import sys, qtuning_fast.lifelong.runs; print('matplotlib' in sys.modules)", PYTHONPATH=".")
    assert result.stdout.strip() == "False", result.stderr


def test_the_demo_is_a_command_that_exists() -> None:
    from typer.testing import CliRunner

    from qtuning_fast.cli import app

    recipe = (ROOT / "Makefile").read_text()
    [line] = [line for line in recipe.splitlines() if "qtuning-fast run" in line]
    arguments = line.split("qtuning-fast ")[1].split()
    arguments[arguments.index("--out") + 1] = "/dev/null"  # the one thing that is wrong with it
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "out is '/dev/null'" in result.output
