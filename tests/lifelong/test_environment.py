"""What `qtuning-fast info` says, and what a run records of the machine."""

from __future__ import annotations

import platform

import pytest
import torch

from qtuning_fast.lifelong import environment
from qtuning_fast.lifelong.environment import describe_environment, device_name, versions


def test_every_section_says_something() -> None:
    sections = describe_environment()
    title, *rest = sections
    assert title.startswith("qtuning_fast ") and rest == ["Packages", "Devices", "Backends"]
    assert ("python", platform.python_version()) in sections[title]
    assert dict(sections["Packages"])["torch"] == torch.__version__
    assert {"reference", "composed", "native", "fused"} <= dict(sections["Backends"]).keys()


def test_a_missing_package_is_called_missing_with_its_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", {"no-such-package": "for nothing"})
    assert describe_environment()["Packages"] == [("no-such-package", "missing (for nothing)")]


def test_what_a_run_records() -> None:
    assert versions().keys() == {"qtuning_fast", "python", "torch", "transformers", "numpy"}
    assert device_name(torch.device("cpu")) == f"cpu, {torch.get_num_threads()} threads"
