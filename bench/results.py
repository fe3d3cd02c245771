"""A file of results: the figures of a benchmark as JSON, with everything that is needed to trust and to repeat them.

The file is rewritten after each entry, so that a run that is cut off keeps what it has measured.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import qtuning_fast.attention
import qtuning_fast.kernels
from qtuning_fast.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "peft", "flash-attn")
SOURCES = {  # what computes the operator, wherever it is installed
    "kernels": Path(next(iter(qtuning_fast.kernels.__path__))),
    "backends": Path(next(iter(qtuning_fast.attention.__path__))),
}
TABLES = {
    "blocks.json": "kernels/blocks.json",
    "backend_order.json": "qtuning_fast/attention/backend_order.json",
}  # what runs measure
RUNS = Path("runs/bench")


class Results:
    """The figures of one benchmark on one device.

    Args:
        question: what was measured: the name of the file without its suffix.
        out: the JSON file; its folder is made.
        device: "cpu" or "cuda".
        command: the command that measures it again.
        going_on: keep the entries that the file already holds, from an earlier process.
        settings: whatever else the figures depend on.
    """

    def __init__(
        self, question: str, out: Path, device: str, command: str = "", *, going_on: bool = False, **settings: Any
    ) -> None:
        self.out = out
        self.document: dict[str, Any] = {"question": question, "command": command}
        self.document |= provenance(device) | settings | {"entries": {}, "errors": {}, "units": {}}
        if going_on and out.exists():
            before = json.loads(out.read_text())
            self.document |= {name: before[name] for name in ("entries", "errors", "units")}
        self.write()

    def add(self, name: str, entry: dict[str, Any]) -> None:
        self.document["entries"][name] = entry
        self.write()

    def fail(self, name: str, reason: str) -> None:
        """Keeps the reason why an entry could not be measured."""
        self.document["errors"][name] = reason
        self.write()

    def finish(self) -> int:
        """Prints the entries that could not be measured; returns the exit status."""
        for name, reason in self.document["errors"].items():
            print(f"\n{name}: {reason}")
        return 1 if self.document["errors"] else 0

    def write(self) -> None:
        write_json(self.out, self.document)

    def heading(self) -> str:
        """Device and versions."""
        versions = ", ".join(f"{name} {number}" for name, number in self.document["versions"].items())
        return f"{device_line(self.document['device'])}\n{versions}"

    def measured(self) -> str:
        """Device, torch and triton in one line, for tables that are measured."""
        known = self.document["versions"]
        computing = ", ".join(f"{name} {known[name]}" for name in ("torch", "triton") if name in known)
        return f"{device_line(self.document['device'])}, {computing}"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replaces a file at once: a process that is cut off leaves it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(document, indent=1) + "\n")
    draft.replace(path)


def provenance(device: str | Mapping[str, Any]) -> dict[str, Any]:
    """Device, versions, date and code. The device is given by its type, or by what is known of it."""
    return {
        "device": device_facts(device) if isinstance(device, str) else dict(device),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--", ".", *(f":!{path}" for path in TABLES.values()))),
        "digests": digests(),
        "load_before": round(os.getloadavg()[0], 2),  # more than the threads in use: another program was running
    }


def device_facts(device: str) -> dict[str, Any]:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        memory = round(properties.total_memory / 2**30, 1)
        return {"type": "cuda", "name": torch.cuda.get_device_name(), "GiB": memory, "nvidia_smi": _nvidia_smi()}
    return {"type": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}


def device_folder(device: Mapping[str, Any]) -> str:
    """The folder of a device's results: "cpu", "h100", "h200"."""
    model = re.search(r"[A-Z]+\d+", device["name"])
    return "cpu" if device["type"] == "cpu" else (model[0] if model else device["name"].replace(" ", "-")).lower()


def device_line(facts: dict[str, Any]) -> str:
    extent = f"{facts['threads']} threads" if facts["type"] == "cpu" else f"{facts['GiB']} GiB"
    return f"{facts['name']}, {extent}"


def versions() -> dict[str, str]:
    found = {"qtuning_fast": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def digests() -> dict[str, str]:
    """Digests of the code that computes the operator, block sizes included, by the names in SOURCES."""
    return {name: _digest(folder) for name, folder in SOURCES.items()}


def changed_since(document: dict[str, Any]) -> list[str]:
    """Which of the SOURCES have changed since a document's figures were measured."""
    now = digests()
    return [name for name, digest in document["digests"].items() if now.get(name) != digest]


def _digest(folder: Path) -> str:
    sha = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".h") or p.name == "blocks.json"):
        sha.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return sha.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    """None outside a checkout, and where there is no git."""
    if not (ROOT / "setup.py").exists():  # an installed package, perhaps within a checkout of something else
        return None
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _nvidia_smi() -> str | None:
    """Driver, highest clock and power limit; None if nvidia-smi does not answer."""
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"
