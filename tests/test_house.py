"""The rules of the house that no linter checks."""

import ast
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DRAWING = {
    "plots.py",
    "class_incremental_plots.py",
    "plot_style.py",
    "page.py",
    "samples.py",
}  # themselves imported only where a report is written
# Parameters are renamed, so what a model can do is found by running it. Who reads signatures all the same, and why:
READING_SIGNATURES = {
    "cli_options.py": "its own commands', to put the options of the settings behind theirs",
    "attention/api.py": "its own function's, to bind arguments",
    "attention/composed/vendors/packages.py": "an interface of flash-attn 4, which needs its GPU",
    "integrations/transformers/layers.py": "a model's, to say what it reads and to run it on that; the run decides",
    "integrations/transformers/positions.py": "a stack's, to read a call's positional arguments; nothing is decided",
    "model/pretrained.py": "the base model's, which Trainer reads to choose a dataset's columns",
}
# What has no test file of its name, and why. (A module that only imports needs none.)
WITHOUT_TESTS = {
    "qtuning_fast/__init__.py": "what it imports is tested here, and so is what it leaves alone",
    "qtuning_fast/bench/__init__.py": "a path; imported here from a bare checkout, in test_wheel.py from a wheel",
    "qtuning_fast/kernels/__init__.py": "likewise",
    "qtuning_fast/lifelong/__init__.py": "what it imports is tested here",
    "qtuning_fast/version.py": "one constant",
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


def only_imports(path: Path) -> bool:
    """Whether a file does nothing but import, and list in `__all__` what."""
    return all(
        isinstance(node, (ast.Import, ast.ImportFrom))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
        for node in ast.parse(path.read_text()).body
    )


def home_of_tests(module: Path) -> Path:
    """Where the tests of a module belong: the same folders, less `qtuning_fast`; a package's own stand inside it."""
    folders = module.parent.parts[1:] if module.parts[0] == "qtuning_fast" else module.parent.parts
    name = module.parent.name if module.stem == "__init__" else module.stem
    return Path("tests", *folders, f"test_{name}.py")


def test_every_module_has_a_test_file_of_its_name() -> None:
    modules = {
        path.relative_to(ROOT)
        for folder in ("kernels", "qtuning_fast", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if not only_imports(path)
    }
    without = {module.as_posix() for module in modules if not (ROOT / home_of_tests(module)).exists()}
    assert without == WITHOUT_TESTS.keys(), "each needs a test file of its name, or a reason in WITHOUT_TESTS"


def test_test_files_that_are_named_somewhere_exist() -> None:
    """In the Makefile's targets, on the pages, and in the order in which a GPU runs them."""
    recipe = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    named = set(re.findall(r"(?<![\w,])tests/[\w/]+(?:\.py)?(?=\s|$)", recipe))
    for folder, names in re.findall(r"\$\(addprefix (tests/[\w/]+),([^)]*)\)", recipe):
        named |= {folder + name for name in names.split()}
    for path in (ROOT / "bench").rglob("*.py"):
        named |= set(re.findall(r"[\"'(](tests/[\w/]+(?:\.py)?)[\"':]", path.read_text()))
    for path in (ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        named |= set(re.findall(r"tests/[\w/]+\.py", path.read_text()))
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("package", ["qtuning_fast", "qtuning_fast.lifelong"])
def test_every_public_name_is_there_and_no_other(package: str) -> None:
    module = import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"'{package}' has no attribute 'attention_with_gates'"):
        module.attention_with_gates  # noqa: B018


def test_the_operator_loads_without_transformers() -> None:
    result = run_python("import sys, qtuning_fast; sys.exit('transformers' in sys.modules)", PYTHONPATH=".")
    assert result.returncode == 0, result.stderr


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


@pytest.mark.parametrize("place", range(4))
def test_the_demos_are_commands_that_exist(place: int) -> None:
    from typer.testing import CliRunner

    from qtuning_fast.cli import app

    recipe = (ROOT / "Makefile").read_text().replace("\\\n", "")
    lines = [line for line in recipe.splitlines() if "qtuning-fast run" in line]
    assert len(lines) == 4
    variables = dict(re.findall(r"^(\w+) := (.*)$", recipe, re.MULTILINE))
    line = re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], lines[place])
    arguments = line.split("qtuning-fast ")[1].split()
    arguments[arguments.index("--out") + 1] = "/dev/null"  # the one thing that is wrong with it
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "out is '/dev/null'" in result.output
