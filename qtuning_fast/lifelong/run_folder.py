"""The folder of a run: one process at a time, one run a folder, whose settings are in `run.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.method.settings import in_full
from qtuning_fast.model.checked_files import read_json, write_json

RUN_FILE = "run.json"


def refuse_foreign_folder(folder: Path) -> None:
    """Raise a ValueError if a folder holds something, but no run."""
    if not folder.exists() or (folder / RUN_FILE).exists():
        return
    # A run that was killed at once leaves hidden files.
    if any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run; choose another folder")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it; if nothing of a run is in it after the block, remove it.

    Raises:
        ValueError: another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"{folder}: another process runs in this folder") from None
    finally:
        if not (folder / RUN_FILE).exists():  # a refused run leaves nothing behind
            (folder / ".lock").unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write `run.json`.

    Raises:
        ValueError: the folder holds another run; the message says in what they differ.
    """
    path, current = folder / RUN_FILE, dict(settings)
    if not path.exists():
        write_json(path, current)
        return
    recorded = read_json(path)
    for name, kind in (("method", QTuningConfig), ("training", TrainingOptions)):
        if isinstance(recorded.get(name), dict):  # a setting that is not there means something, too
            recorded[name], current[name] = (in_full(kind, each[name]) for each in (recorded, current))
    different = sorted(name for name in current.keys() | recorded.keys() if current.get(name) != recorded.get(name))
    if different:
        details = "; ".join(f"{name}: {_difference(recorded.get(name), current.get(name))}" for name in different)
        raise ValueError(f"{folder} holds another run ({details}); choose another folder, or remove that one")


def _difference(recorded: Any, current: Any) -> str:
    if isinstance(recorded, dict) and isinstance(current, dict):
        keys = [key for key in recorded.keys() | current.keys() if recorded.get(key) != current.get(key)]
        return ", ".join(f"{key} was {recorded.get(key)!r}, now {current.get(key)!r}" for key in sorted(keys))
    return f"was {recorded!r}, now {current!r}"
