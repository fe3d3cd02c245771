"""Checkpoints of a model: `adapter_config.json` and safetensors files beside it, never a pickle.

`adapter_config.json` names every other file with its SHA-256 and is written last, in one step: until then the files of
the older save stay, so that a folder is always one whole save or refused.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from qtuning_fast.attention.common import GATES
from qtuning_fast.method.adapter import AdapterInfo
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.method.gate import GATE_PER
from qtuning_fast.model.backbone import Backbone
from qtuning_fast.model.checked_files import (
    TEMPORARY,
    CorruptFileError,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from qtuning_fast.model.registry import AdapterFile, AdapterRegistry, StoredAdapter

CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 4
READABLE_VERSIONS = (3, 4)

_QUEUE = "queue."
_OURS = re.compile(
    rf"(task-\d+|state)-[0-9a-f]{{12}}\.safetensors|\.(task|state|adapter_config).*{re.escape(TEMPORARY)}"
)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that `QTuningModel.save_pretrained` keeps.

    Attributes:
        config: of the model.
        fingerprint: of the base model it belongs to (`qtuning_fast.model.fingerprint`).
        base_model: name of the base model's class, for people.
        adapters: of the finished tasks, in order.
        learning: the state of the training prefix and the discriminator, by name.
        queue: the state of the queue.
        last_learned: the task that was learned last, whose prompt the training prefix holds; None where there is none.
    """

    config: QTuningConfig
    fingerprint: str
    base_model: str
    adapters: AdapterRegistry
    learning: dict[str, Tensor]
    queue: dict[str, Tensor]
    last_learned: str | None = None

    def check_base_model(self, backbone: Backbone, folder: Path) -> None:
        """Raise a ValueError where the checkpoint in this folder was made for another base model."""
        if backbone.fingerprint != self.fingerprint:
            raise ValueError(
                f"{folder} was made for another base model: a {self.base_model} with the fingerprint "
                f"{self.fingerprint[:12]}, not this {type(backbone.model).__name__} in {backbone.dtype}"
                + (" (load it in float32 or bfloat16)" if backbone.dtype == torch.float16 else "")
            )


def write_checkpoint(folder: Path, saved: Checkpoint) -> None:
    """Write `saved` into `folder`; a save that was there stays valid until this one is whole.

    Adapters that lie in the folder already stay where they are, and what was in memory only has a file from here on.
    Files that were there and belong to no save are left alone.

    Raises:
        CorruptFileError: an adapter that is on disk only cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    with FileLock(folder / ".lock"):
        entries = saved.adapters.entries()
        files = [_written(folder, number, entry, saved.adapters) for number, entry in enumerate(entries)]
        state = write_tensors(folder, "state", _joined(saved.learning, saved.queue))
        content = {
            "format_version": FORMAT_VERSION,
            "config": saved.config.to_dict(),
            "base_model": {"class": saved.base_model, "fingerprint": saved.fingerprint},
            "tasks": [
                {**asdict(entry.info), "file": file.file, "sha256": file.sha256} for entry, file in zip(entries, files)
            ],
            "last_learned": saved.last_learned,
            "state": state,
        }
        write_json(folder / CONFIG_FILE, content)
        for entry, file in zip(entries, files):
            saved.adapters.lies_in(entry, file)
        named = {state["file"], *(file.file for file in files)}
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in named:
                path.unlink(missing_ok=True)


def _written(folder: Path, number: int, entry: StoredAdapter, store: AdapterRegistry) -> AdapterFile:
    """An adapter's file in `folder`: the one that is there, or a new one."""
    file = entry.file
    if file is not None and file.folder == folder and file.is_whole():
        return file
    return AdapterFile(folder, **write_tensors(folder, f"task-{number:03d}", store.load(entry, keep=False).tensors()))


def read_checkpoint(folder: Path, *, lazy: bool = False) -> Checkpoint:
    """What `write_checkpoint` wrote.

    Args:
        lazy: leave the adapters on disk until they are needed.

    Raises:
        FileNotFoundError: nothing was saved there.
        CorruptFileError: a file is damaged or missing, or the index is not one that `write_checkpoint` wrote.
        ValueError: the format version is not one of READABLE_VERSIONS.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: no Q-tuning model was saved there")
    while True:
        content = read_json(path)
        try:
            return _read_files(folder.resolve(), content, lazy)
        except CorruptFileError:
            if read_json(path) == content:  # otherwise it was saved anew while it was read
                raise


def _read_files(folder: Path, content: dict[str, Any], lazy: bool) -> Checkpoint:
    version = content.get("format_version")
    if version not in READABLE_VERSIONS:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format version {version}; this version of qtuning_fast reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}"
        )
    try:
        config = QTuningConfig.from_dict(content["config"])
        adapters = AdapterRegistry()
        for entry in content["tasks"]:
            file = AdapterFile(folder, entry["file"], entry["sha256"])
            stored = adapters.add(_info(folder, entry), file=file)
            if not lazy:
                adapters.load(stored)
        if len(adapters) < len(content["tasks"]):
            raise CorruptFileError(f"{folder / CONFIG_FILE} names a task twice")
        state = read_tensors(folder, content["state"])
        base, last = content["base_model"], content["last_learned"]
        if last is not None and last not in adapters:
            raise CorruptFileError(f"{folder / CONFIG_FILE}: the task learned last, {last!r}, is not among its tasks")
        learning, queue = _parted(state if version == FORMAT_VERSION else from_version_3(state))
        return Checkpoint(config, base["fingerprint"], base["class"], adapters, learning, queue, last)
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{folder / CONFIG_FILE} is not an index of a saved model: {error!r}") from None


def _joined(learning: dict[str, Tensor], queue: dict[str, Tensor]) -> dict[str, Tensor]:
    return learning | {f"{_QUEUE}{name}": x for name, x in queue.items()}


def _parted(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    queue = {name.removeprefix(_QUEUE): x for name, x in state.items() if name.startswith(_QUEUE)}
    return {name: x for name, x in state.items() if not name.startswith(_QUEUE)}, queue


def from_version_3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state by the names it has now: the training prefix was called `live` then."""
    return {re.sub(r"^live\.", "prefix.", name): x for name, x in state.items()}


def _info(folder: Path, entry: dict[str, Any]) -> AdapterInfo:
    """What the index says of an adapter."""
    name, labels = entry["name"], entry["label_names"]
    if not isinstance(name, str) or not isinstance(labels, list) or not all(isinstance(each, str) for each in labels):
        raise CorruptFileError(f"{folder / CONFIG_FILE}: the name or the labels of task {name!r} are no text")
    numbers = {key: entry[key] for key in ("position_shift", "prefix_rows", "classes", "bytes")}
    kinds = entry["gate"] in (None, *GATES) and entry["gate_per"] in (None, *GATE_PER)
    if not kinds or not all(isinstance(number, int) and number >= 0 for number in numbers.values()):
        raise CorruptFileError(f"{folder / CONFIG_FILE}: the gate or the sizes of task {name!r} are none")
    return AdapterInfo(name=name, label_names=tuple(labels), gate=entry["gate"], gate_per=entry["gate_per"], **numbers)
