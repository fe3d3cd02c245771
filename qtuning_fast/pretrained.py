"""A saved model on disk: `adapter_config.json` and safetensors files beside it, never a pickle.

`adapter_config.json` names every other file with its SHA-256 and is written last, in one step: until then the files of
the older save stay, so that a folder is always one whole save or refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from qtuning_fast.adapter import TaskAdapter
from qtuning_fast.config import QTuningConfig
from qtuning_fast.reference import GATES
from qtuning_fast.storage import TEMPORARY, CorruptFileError, read_json, read_tensors, write_json, write_tensors

CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 2

_OURS = re.compile(
    rf"(task-\d+|state)-[0-9a-f]{{12}}\.safetensors|\.(task|state|adapter_config).*{re.escape(TEMPORARY)}"
)


@dataclass(frozen=True)
class SavedModel:
    """Everything that `QTuningModel.save_pretrained` keeps.

    Attributes:
        config: of the model.
        fingerprint: of the base model it belongs to (`qtuning_fast.fingerprint`).
        base_model: name of the base model's class, for people.
        adapters: of the finished tasks, in order.
        state: the queue, the live prefix and the discriminator, by name.
    """

    config: QTuningConfig
    fingerprint: str
    base_model: str
    adapters: Sequence[TaskAdapter]
    state: dict[str, Tensor]


def write_saved(folder: Path, saved: SavedModel) -> None:
    """Write `saved` into `folder`; a save that was there stays valid until this one is whole.

    Files that were there and belong to no save are left alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        tasks: list[dict[str, Any]] = [
            {
                "name": adapter.name,
                "label_names": list(adapter.label_names),
                "gate": adapter.gate,
                "position_shift": adapter.position_shift,
                **write_tensors(folder, f"task-{number:03d}", adapter.tensors()),
            }
            for number, adapter in enumerate(saved.adapters)
        ]
        state = write_tensors(folder, "state", saved.state)
        content = {
            "format_version": FORMAT_VERSION,
            "config": saved.config.to_dict(),
            "base_model": {"class": saved.base_model, "fingerprint": saved.fingerprint},
            "tasks": tasks,
            "state": state,
        }
        write_json(folder / CONFIG_FILE, content)
        named = {entry["file"] for entry in (*tasks, state)}
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in named:
                path.unlink(missing_ok=True)


def read_saved(folder: Path) -> SavedModel:
    """What `write_saved` wrote.

    Raises:
        FileNotFoundError: nothing was saved there.
        CorruptFileError: a file is damaged or missing, or the index is not one that `write_saved` wrote.
        ValueError: the format version is not this one.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: no Q-tuning model was saved there")
    while True:
        content = read_json(path)
        try:
            return _read_files(folder, content)
        except CorruptFileError:
            if read_json(path) == content:  # otherwise it was saved anew while it was read
                raise


def _read_files(folder: Path, content: dict[str, Any]) -> SavedModel:
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format version {version}; this version of qtuning_fast reads {FORMAT_VERSION}"
        )
    try:
        config = QTuningConfig.from_dict(content["config"])
        adapters = [_read_adapter(folder, entry) for entry in content["tasks"]]
        if len({adapter.name for adapter in adapters}) < len(adapters):
            raise CorruptFileError(f"{folder / CONFIG_FILE} names a task twice")
        state = read_tensors(folder, content["state"])
        base = content["base_model"]
        return SavedModel(config, base["fingerprint"], base["class"], adapters, state)
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{folder / CONFIG_FILE} is not an index of a saved model: {error!r}") from None


def _read_adapter(folder: Path, entry: dict[str, Any]) -> TaskAdapter:
    name, labels = entry["name"], entry["label_names"]
    if not isinstance(name, str) or not isinstance(labels, list) or not all(isinstance(each, str) for each in labels):
        raise CorruptFileError(f"{folder / CONFIG_FILE}: the name or the labels of task {name!r} are no text")
    if entry["gate"] not in (None, *GATES) or not isinstance(entry["position_shift"], int):
        raise CorruptFileError(f"{folder / CONFIG_FILE}: the gate or the position_shift of task {name!r} is none")
    adapter = TaskAdapter.from_tensors(
        read_tensors(folder, entry),
        name=name,
        label_names=labels,
        gate=entry["gate"],
        position_shift=entry["position_shift"],
    )
    if adapter.head_bias is not None and len(labels) != len(adapter.head_bias):
        raise CorruptFileError(
            f"{folder / CONFIG_FILE}: task {name!r} has {len(labels)} labels, its head another number"
        )
    return adapter
