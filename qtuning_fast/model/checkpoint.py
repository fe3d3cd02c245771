"""Checkpoints of a model: `adapter_config.json` and safetensors files beside it, never a pickle.

`adapter_config.json` names every other file with its SHA-256. It is written last and atomically; until then the files
of the previous checkpoint stay. So a folder holds one complete checkpoint, or reading it fails.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from qtuning_fast.attention.common import GATES
from qtuning_fast.method.adapter import AdapterInfo
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.method.gate import GATE_PER
from qtuning_fast.method.labels import PROBLEM_TYPES, SINGLE
from qtuning_fast.method.task_rule import TaskRule
from qtuning_fast.method.task_rules import RULES, ClosedForm
from qtuning_fast.model.backbone import Backbone
from qtuning_fast.model.checked_files import (
    TEMPORARY,
    CorruptFileError,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from qtuning_fast.model.known_tasks import classes_of
from qtuning_fast.model.registry import (
    AdapterFile,
    AdapterRegistry,
    Registry,
    StatisticsFile,
    StatisticsInfo,
    StatisticsRegistry,
    Stored,
    StoredFile,
)

CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 4
READABLE_VERSIONS = (3, 4)

_QUEUE = "queue."
_NEW_NAMES = {"live": "learning.prefix", "discriminator": "learning.discriminator", "head": "learning.head"}
_OURS = re.compile(
    rf"((task|statistics)-\d+|state)-[0-9a-f]{{12}}\.safetensors"
    rf"|\.(task|statistics|state|adapter_config).*{re.escape(TEMPORARY)}"
)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that `QTuningModel.save_pretrained` writes.

    Attributes:
        config: the model's configuration.
        fingerprint: fingerprint of its base model (`qtuning_fast.model.fingerprint`).
        base_model: name of the base model's class, for people to read.
        adapters: adapters of the finished tasks, in order.
        learning: the state of the training prefix and the discriminator, by name.
        queue: the state of the queue.
        last_learned: the task learned last, whose prompt the training prefix holds; None if there is none.
        statistics: those of the tasks that have some.
        task_rule: the rule that infers tasks.
    """

    config: QTuningConfig
    fingerprint: str
    base_model: str
    adapters: AdapterRegistry
    learning: dict[str, Tensor]
    queue: dict[str, Tensor]
    last_learned: str | None = None
    statistics: StatisticsRegistry = field(default_factory=StatisticsRegistry)
    task_rule: TaskRule = field(default_factory=ClosedForm)

    def check_base_model(self, backbone: Backbone, folder: Path) -> None:
        """Raise a ValueError if the checkpoint in this folder was made for another base model."""
        if backbone.fingerprint != self.fingerprint:
            raise ValueError(
                f"{folder} was made for another base model: a {self.base_model} with the fingerprint "
                f"{self.fingerprint[:12]}, not this {type(backbone.model).__name__} in {backbone.dtype}"
                + (" (load it in float32 or bfloat16)" if backbone.dtype == torch.float16 else "")
            )


def write_checkpoint(folder: Path, saved: Checkpoint) -> None:
    """Write `saved` into `folder`; a previous checkpoint there stays valid until this one is complete.

    Adapters whose files are in the folder already are not rewritten; adapters in memory get a file. Files that belong
    to no checkpoint are left alone.

    Raises:
        CorruptFileError: an adapter that is only on disk cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    with FileLock(folder / ".lock"):
        entries = saved.adapters.entries()
        files = [_written(folder, f"task-{n:03d}", each, saved.adapters, AdapterFile) for n, each in enumerate(entries)]
        recorded = {entry.info.name: entry for entry in saved.statistics.entries()}
        statistics = {
            entry.info.name: _written(
                folder, f"statistics-{n:03d}", recorded[entry.info.name], saved.statistics, StatisticsFile
            )
            for n, entry in enumerate(entries)
            if entry.info.name in recorded
        }
        state = write_tensors(folder, "state", _joined(saved.learning, saved.queue))
        content = {
            "format_version": FORMAT_VERSION,
            "config": saved.config.to_dict(),
            "base_model": {"class": saved.base_model, "fingerprint": saved.fingerprint},
            "tasks": [
                task_entry(entry.info, file, _info_of(recorded.get(entry.info.name)), statistics.get(entry.info.name))
                for entry, file in zip(entries, files)
            ],
            "last_learned": saved.last_learned,
            "state": state,
        }
        if type(saved.task_rule) is not ClosedForm:
            content["task_rule"] = {"name": saved.task_rule.name, "settings": saved.task_rule.settings}
        write_json(folder / CONFIG_FILE, content)
        for entry, file in zip(entries, files):
            saved.adapters.lies_in(entry, file)
        for name, its_file in statistics.items():
            saved.statistics.lies_in(recorded[name], its_file)
        named = {state["file"], *(file.file for file in (*files, *statistics.values()))}
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in named:
                path.unlink(missing_ok=True)


def _written(
    folder: Path,
    stem: str,
    entry: Stored[Any, Any],
    store: Registry[Any, Any],
    kind: Callable[..., StoredFile[Any, Any]],
) -> StoredFile[Any, Any]:
    """Return an entry's file in `folder`, written if it does not exist."""
    file = entry.file
    if file is not None and file.folder == folder and file.is_whole():
        return file
    return kind(folder, **write_tensors(folder, stem, store.load(entry, keep=False).tensors()))


def task_entry(
    info: AdapterInfo,
    file: StoredFile[Any, Any],
    statistics: StatisticsInfo | None = None,
    statistics_file: StoredFile[Any, Any] | None = None,
) -> dict[str, Any]:
    """Return what an index says of a task: its adapter and, if it has some, its statistics, with their files."""
    content = asdict(info) | {"file": file.file, "sha256": file.sha256}
    if info.problem_type == SINGLE:
        del content["problem_type"]  # earlier versions do not know it
    if statistics is None or statistics_file is None:
        return content
    recorded = asdict(statistics) | {"file": statistics_file.file, "sha256": statistics_file.sha256}
    del recorded["name"]
    return content | {"statistics": recorded}


def _info_of(entry: Stored[StatisticsInfo, Any] | None) -> StatisticsInfo | None:
    return None if entry is None else entry.info


def read_checkpoint(folder: Path, *, lazy: bool = False, with_state: bool = True) -> Checkpoint:
    """Read a checkpoint that `write_checkpoint` wrote.

    Args:
        lazy: leave the adapters on disk until they are needed.
        with_state: read the training prefix and the queue, too; an index of tasks alone has none.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        CorruptFileError: a file is damaged or missing, or `write_checkpoint` did not write the index.
        ValueError: the format version is not in READABLE_VERSIONS.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: no Q-tuning model was saved there")
    while True:
        content = read_json(path)
        try:
            return _read_files(folder.resolve(), content, lazy, with_state)
        except CorruptFileError:
            if read_json(path) == content:  # if not, it was replaced while it was read
                raise


def _read_files(folder: Path, content: dict[str, Any], lazy: bool, with_state: bool) -> Checkpoint:
    version = content.get("format_version")
    if version not in READABLE_VERSIONS:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format version {version}; this version of qtuning_fast reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}"
        )
    try:
        config = QTuningConfig.from_dict(content["config"])
        adapters, statistics = AdapterRegistry(), StatisticsRegistry()
        for entry in content["tasks"]:
            file = AdapterFile(folder, entry["file"], entry["sha256"])
            stored = adapters.add(_info(folder, entry), file=file)
            if not lazy:
                adapters.load(stored)
            if "statistics" in entry:
                of = _statistics_info(folder, stored.info, entry["statistics"])
                kept = StatisticsFile(folder, entry["statistics"]["file"], entry["statistics"]["sha256"])
                recorded = statistics.add(of, file=kept)
                if not lazy:
                    statistics.load(recorded)
        if len(adapters) < len(content["tasks"]):
            raise CorruptFileError(f"{folder / CONFIG_FILE} names a task twice")
        state = read_tensors(folder, content["state"]) if with_state else {}
        base, last = content["base_model"], content["last_learned"]
        if last is not None and last not in adapters:
            raise CorruptFileError(f"{folder / CONFIG_FILE}: {last!r}, the task learned last, is not among its tasks")
        learning, queue = _parted(state if version == FORMAT_VERSION else from_version_3(state))
        return Checkpoint(
            config, base["fingerprint"], base["class"], adapters, learning, queue, last, statistics, _rule(content)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{folder / CONFIG_FILE} is not an index of a saved model: {error!r}") from None


def _rule(content: dict[str, Any]) -> TaskRule:
    """Return the rule that the index names, or the default one; warn if it is a user's own, which is not at hand."""
    if "task_rule" not in content:
        return ClosedForm()
    name, settings = content["task_rule"]["name"], content["task_rule"]["settings"]
    if name in RULES:
        return RULES[name](**settings)
    warnings.warn(
        f"the model was saved with the task rule {name!r}, which is not among those of this library; set task_rule to "
        f"it, or tasks are inferred by {ClosedForm.name!r}",
        stacklevel=5,
    )
    return ClosedForm()


def _joined(learning: dict[str, Tensor], queue: dict[str, Tensor]) -> dict[str, Tensor]:
    return learning | {f"{_QUEUE}{name}": x for name, x in queue.items()}


def _parted(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    queue = {name.removeprefix(_QUEUE): x for name, x in state.items() if name.startswith(_QUEUE)}
    return {name: x for name, x in state.items() if not name.startswith(_QUEUE)}, queue


def from_version_3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of a version 3 state, which called the training prefix `live`."""
    return {re.sub(r"^live\.", "prefix.", name): x for name, x in state.items()}


def rename_version_3(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename the entries of a whole model's state dict of version 3, in place: a hook of `load_state_dict`."""
    for name in list(state_dict):
        part, dot, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and dot and part in _NEW_NAMES:
            state_dict[f"{prefix}{_NEW_NAMES[part]}.{rest}"] = state_dict.pop(name)


def _statistics_info(folder: Path, task: AdapterInfo, entry: dict[str, Any]) -> StatisticsInfo:
    """Return the index's description of a task's statistics."""
    maps, numbers = entry["feature_maps"], {key: entry[key] for key in ("classes", "bytes")}
    right = isinstance(maps, list) and all(isinstance(each, str) for each in maps)
    right = right and all(isinstance(number, int) and number >= 0 for number in numbers.values())
    if not right or numbers["classes"] != classes_of(task):
        raise CorruptFileError(f"{folder / CONFIG_FILE}: the statistics of task {task.name!r} are invalid")
    return StatisticsInfo(name=task.name, feature_maps=tuple(maps), **numbers)


def _info(folder: Path, entry: dict[str, Any]) -> AdapterInfo:
    """Return the index's description of an adapter."""
    name, labels = entry["name"], entry["label_names"]
    if not isinstance(name, str) or not isinstance(labels, list) or not all(isinstance(each, str) for each in labels):
        raise CorruptFileError(f"{folder / CONFIG_FILE}: the name or the labels of task {name!r} are not text")
    numbers = {key: entry[key] for key in ("position_shift", "prefix_rows", "classes", "bytes")}
    kinds = entry["gate"] in (None, *GATES) and entry["gate_per"] in (None, *GATE_PER)
    if not kinds or not all(isinstance(number, int) and number >= 0 for number in numbers.values()):
        raise CorruptFileError(f"{folder / CONFIG_FILE}: the gate or the sizes of task {name!r} are invalid")
    problem_type = entry.get("problem_type", SINGLE)
    if problem_type not in PROBLEM_TYPES:
        raise CorruptFileError(f"{folder / CONFIG_FILE}: task {name!r} has an unknown problem type, {problem_type!r}")
    return AdapterInfo(
        name=name,
        label_names=tuple(labels),
        gate=entry["gate"],
        gate_per=entry["gate_per"],
        problem_type=problem_type,
        **numbers,
    )
