"""The built wheel, in an environment that holds what the wheel asks for and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.thorough
Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    copy, built = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".*", "runs", "build", "site", "results", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built), str(copy))
    [wheel] = built.glob("*.whl")
    return wheel


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)


def bare_environment(folder: Path, wheel: Path, extra: str) -> Shell:
    """What an installation of `qtuning_fast[extra]` would have, as links to the packages that are installed here.

    Returns:
        What runs a command of that environment.
    """
    venv.create(folder, symlinks=True)
    pip("--python", str(folder / "bin" / "python"), "install", "--no-deps", str(wheel))
    [packages] = folder.glob("lib/python*/site-packages")
    [installed] = packages.glob("qtuning_fast-*.dist-info")
    for each in needed(PathDistribution(installed), extra):
        for name in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            link = packages / name
            if not link.exists():  # packages of one namespace share a folder
                link.symlink_to(Path(str(each.locate_file(name))))

    def shell(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = (str(folder / "bin" / command[0]), *command[1:])
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    return shell


def needed(package: Distribution, extra: str) -> Iterator[Distribution]:
    """All distributions that a package requires, and these require, with the extras that are asked for."""
    found: dict[tuple[str, str], Distribution] = {}
    waiting = [(package, extra)]
    while waiting:
        package, extra = waiting.pop()
        for requirement in map(Requirement, package.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                for each in ("", *requirement.extras):
                    if (requirement.name, each) not in found:
                        found[requirement.name, each] = distribution(requirement.name)
                        waiting.append((found[requirement.name, each], each))
    yield from found.values()


def test_the_operator_and_the_model_need_what_the_wheel_says(wheel: Path, tmp_path: Path) -> None:
    shell = bare_environment(tmp_path, wheel, "")
    code = """
import torch, qtuning_fast, qtuning_fast.integrations.transformers, qtuning_fast.kernels, qtuning_fast.bench
from transformers import BertConfig, BertModel
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
model = qtuning_fast.QTuningModel(BertModel(BertConfig(**sizes)), qtuning_fast.QTuningConfig(prompt_length=2))
model.start_task("reviews", 2)
print(model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape, qtuning_fast.__file__)
"""
    result = shell("python", "-c", code)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 2])" in result.stdout and str(tmp_path) in result.stdout
    (tmp_path / "colours.csv").write_text("text,label\nred,warm\n")
    result = shell("qtuning-fast", "run", "--task", "colours.csv", "--out", "run")
    assert result.returncode != 0 and "pip install 'qtuning_fast[lifelong]'" in result.stderr, result.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_line_runs_on_a_file(wheel: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    shell = bare_environment(tmp_path / "environment", wheel, "lifelong")
    result = shell("qtuning-fast", "info")
    assert result.returncode == 0 and "backend" in result.stdout.lower(), result.stdout + result.stderr

    rows = [f"the {('red', 'blue')[i % 2]} {i},{('warm', 'cold')[i % 2]}" for i in range(40)]
    (tmp_path / "colours.csv").write_text("\n".join(["text,label", *rows]))
    options = "--steps 2 --eval-every 2 --batch-size 4 --prompt-length 2 --shared-length 2 --max-length 8"
    data = ("--task", str(tmp_path / "colours.csv"), "--model", str(tiny_model_folder))
    result = shell("qtuning-fast", "run", *data, *options.split(), "--out", "run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "environment" / "run" / "report.html").is_file()
    metrics = json.loads((tmp_path / "environment" / "run" / "metrics.json").read_text())
    assert metrics["tasks"] == ["colours"]
    result = shell("qtuning-fast", "predict", "--run", "run", "--task", "colours", "the red")
    assert result.returncode == 0 and ("warm" in result.stdout or "cold" in result.stdout), result.stderr


FILES_OF_BENCH = {
    *("accuracy", "console", "eager", "figures", "flex", "layer_cost", "measure", "memory", "peers", "results", "sdpa"),
    *("shapes", "timing"),
}


def test_a_wheel_has_of_bench_what_its_command_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.startswith("qtuning_fast/bench/")]
    assert set(files) == {f"qtuning_fast/bench/{name}.py" for name in FILES_OF_BENCH}


def test_the_bench_runs_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    """Every module of bench/ that is in the wheel is used, and none that is not."""
    shell = bare_environment(tmp_path / "environment", wheel, "lifelong")
    code = """
import sys
from qtuning_fast.cli import main
try:
    main()
finally:
    print("loaded:", *sorted(n.rpartition(".")[2] for n in sys.modules if n.startswith("qtuning_fast.bench.")))
"""
    sizes = "--heads 2 --head-size 16 --batch 1 --tokens 8 --prefix-rows 4 --peer eager --quick --out found.json"
    result = shell("python", "-c", code, "bench", *sizes.split())
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(result.stdout.rpartition("loaded: ")[2].split()) == FILES_OF_BENCH
    document = json.loads((tmp_path / "environment" / "found.json").read_text())
    assert document["entries"]["own"]["rows"]["eager"]["step"]["eager"]["median"] > 0
    assert document["commit"] is None and document["digests"].keys() == {"kernels", "backends"}
