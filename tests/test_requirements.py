"""The lock: one version of everything that set-up needs, for every Python and platform that is supported."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import metadata, requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / "requirements"
WORKFLOWS = ROOT / ".github" / "workflows"
EXTRAS = ("", "dev", "docs", "triton")  # "": what needs no extra


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, REQUIREMENTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check, lock = script("check"), script("lock")


def environment(python: str, platform: str) -> dict[str, str]:
    system = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": platform.partition("-")[0]}
    if platform.endswith("darwin"):
        system |= {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}
    return dict(default_environment()) | system | {"python_version": python, "python_full_version": f"{python}.9"}


@pytest.mark.parametrize("platform", lock.PLATFORMS)
@pytest.mark.parametrize("python", lock.PYTHONS)
def test_the_lock_has_what_the_package_asks_for(python: str, platform: str) -> None:
    there = environment(python, platform)
    locked = check.pinned("lock.txt", there) | check.pinned("torch.txt", there)
    asked = [Requirement(line) for line in requires("qtuning_fast") or ()]
    assert len(asked) > 20
    for requirement in asked:
        if requirement.marker is None or any(requirement.marker.evaluate(there | {"extra": each}) for each in EXTRAS):
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_the_lock_is_for_the_pythons_that_the_package_takes() -> None:

    assert metadata("qtuning_fast")["Requires-Python"] == f">={lock.PYTHONS[0]}"


def test_the_workflows_run_what_the_makefile_has_on_these_pythons() -> None:
    checks = yaml.safe_load((WORKFLOWS / "checks.yml").read_text())
    assert checks["jobs"]["test"]["strategy"]["matrix"]["python"] == list(lock.PYTHONS)
    for path in (*WORKFLOWS.glob("*.yml"), ROOT / ".ci" / "run"):
        targets = set(re.findall(r"\bmake ([\w-]+)", path.read_text()))
        there = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert targets and targets <= there, path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"numpy": "1.0"}, "numpy is 1.0, in the lock {numpy}"),
        ({"leftover": "2.1"}, "leftover 2.1 is not in the lock"),
        ({"numpy": None}, "numpy {numpy} is not installed"),
        ({"torch": "2.13.0+cpu"}, None),
        ({"nvidia-cublas": None, "cuda-toolkit": None}, None),  # a build of torch for CPUs brings none
    ],
)
def test_differences_from_the_lock_are_named(
    changes: dict[str, str | None], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = {
        name: str(version)
        for file in ("lock.txt", "data.txt", "torch.txt")
        for name, version in check.pinned(file).items()
    }
    there = {name: version for name, version in (locked | {"pip": "23.0"} | changes).items() if version is not None}

    class Distribution:
        def __init__(self, name: str, version: str) -> None:
            self.metadata, self.version = {"Name": name}, version

    monkeypatch.setattr(check, "distributions", lambda: [Distribution(*each) for each in there.items()])
    assert check.differences() == ([] if said is None else [said.format(**locked)])
