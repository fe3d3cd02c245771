"""Checkpoints of a model: `adapter_config.json` and safetensors files beside it, never a pickle.

`adapter_config.json` names every other file with its SHA-256. It is written last and atomically; until then the files
of the previous checkpoint stay. So a folder holds one complete checkpoint, or reading it fails.

A checkpoint of one task, which is for others to use, has its adapter and its statistics, but no queue.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
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
    check_link,
    checked_name,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from qtuning_fast.model.known_tasks import classes_of
from qtuning_fast.model.registry import (
    AdapterFile,
    AdapterRegistry,
    FilesElsewhere,
    Registry,
    StatisticsFile,
    StatisticsInfo,
    StatisticsRegistry,
    Stored,
    StoredFile,
    most_bytes,
)

CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 4
READABLE_VERSIONS = (3, 4)

# Bounds on what a file that may come from anybody can ask for.
MOST_INDEX_BYTES = 64 << 20  # some kilobytes a task
_MOST_STATE_BYTES = 1 << 30  # where the index does not say
_MOST_ROWS = 1 << 14

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
        learning: the state of the training prefix and the discriminator, by name; empty if it is of one task alone.
        queue: the state of the queue; empty if it is of one task alone.
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

    @property
    def is_of_one_task(self) -> bool:
        """Whether it has no queue to learn on from; see `of_task`."""
        return not self.learning

    def of_task(self, name: str | None) -> Checkpoint:
        """Return a checkpoint of one task alone, or for None of all; writing it leaves this one as it is.

        Raises:
            ValueError: there is no such task.
        """
        adapters, statistics = self.adapters.copied(name), self.statistics.copied(name)
        if name is None:
            return replace(self, adapters=adapters, statistics=statistics)
        if name not in adapters:
            raise ValueError(f"task {name!r} is not among the finished tasks: {', '.join(self.adapters) or 'none yet'}")
        alone: dict[str, Any] = {"learning": {}, "queue": {}, "last_learned": None}
        return replace(self, adapters=adapters, statistics=statistics, **alone)

    def check_base_model(self, backbone: Backbone, source: str | Path) -> None:
        """Raise a ValueError if the checkpoint, which is from there, was made for another base model."""
        if backbone.fingerprint != self.fingerprint:
            raise ValueError(
                f"{source} was made for another base model: a {self.base_model} with the fingerprint "
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
        state = None if saved.is_of_one_task else _written_state(folder, _joined(saved.learning, saved.queue))
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
        named = {file.file for file in (*files, *statistics.values())} | ({state["file"]} if state else set())
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


def _written_state(folder: Path, state: dict[str, Tensor]) -> dict[str, Any]:
    return {**write_tensors(folder, "state", state), "bytes": sum(tensor.nbytes for tensor in state.values())}


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


def read_checkpoint(
    folder: Path, *, lazy: bool = False, elsewhere: FilesElsewhere | None = None, with_state: bool = True
) -> Checkpoint:
    """Read a checkpoint that `write_checkpoint` wrote.

    Args:
        lazy: leave the adapters on disk until they are needed.
        elsewhere: from where the files that the index names come when they are needed; None: they are in the folder.
        with_state: whether to read what learning goes on from; without it, the checkpoint is as of one task alone.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        CorruptFileError: a file is damaged or missing, or `write_checkpoint` did not write the index.
        ValueError: the format version is not in READABLE_VERSIONS.
        HubError: a file cannot be downloaded.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_FILE}: no Q-tuning model was saved there")
    check_link(path)
    while True:
        content = read_json(path, most_bytes=MOST_INDEX_BYTES)
        try:
            return _read_files(folder.resolve(), content, lazy, elsewhere, with_state)
        except CorruptFileError:
            if read_json(path) == content:  # if not, it was replaced while it was read
                raise


def _read_files(
    folder: Path, content: dict[str, Any], lazy: bool, elsewhere: FilesElsewhere | None, with_state: bool
) -> Checkpoint:
    version = content.get("format_version")
    if version not in READABLE_VERSIONS:
        raise ValueError(
            f"{folder / CONFIG_FILE} has format version {version}; this version of qtuning_fast reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}"
        )
    try:
        config = _config(content)
        adapters, statistics = AdapterRegistry(), StatisticsRegistry()
        for entry in content["tasks"]:
            info = _info(folder, entry)
            adapters.add(info, file=AdapterFile(folder, checked_name(folder, entry), entry["sha256"], elsewhere))
            if "statistics" in entry:
                kept = entry["statistics"]
                file = StatisticsFile(folder, checked_name(folder, kept), kept["sha256"], elsewhere)
                statistics.add(_statistics_info(folder, info, kept), file=file)
        if len(adapters) < len(content["tasks"]):
            raise CorruptFileError(f"{folder / CONFIG_FILE} names a task twice")
        base, last = content["base_model"], content["last_learned"]
        if last is not None and last not in adapters:
            raise CorruptFileError(f"{folder / CONFIG_FILE}: {last!r}, the task learned last, is not among its tasks")
        if not isinstance(base["fingerprint"], str) or not isinstance(base["class"], str):
            raise CorruptFileError(f"{folder / CONFIG_FILE}: fingerprint or class of the base model are not text")
        rule = _rule(content)
        state_file = content["state"] if with_state else None
        limits = {} if state_file is None else {checked_name(folder, state_file): _most_state_bytes(state_file)}
        for store in () if lazy else (adapters, statistics):
            limits |= store.most_bytes_by_file()
        if elsewhere is not None and limits:
            elsewhere.fetch(limits)
        state = {} if state_file is None else _state(folder, state_file, config)
    except CorruptFileError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        said = repr(error) if isinstance(error, LookupError) else str(error)
        raise CorruptFileError(f"{folder / CONFIG_FILE} is not an index of a saved model: {said}") from None
    for store in () if lazy else (adapters, statistics):
        store.load_all()
    learning, queue = _parted(state if version == FORMAT_VERSION else from_version_3(state))
    return Checkpoint(config, base["fingerprint"], base["class"], adapters, learning, queue, last, statistics, rule)


def _config(content: dict[str, Any]) -> QTuningConfig:
    """Return the configuration, or raise a ValueError if it asks for more than any model has."""
    config = QTuningConfig.from_dict(content["config"])
    for name in ("prompt_length", "shared_length", "rank"):
        if getattr(config, name) > _MOST_ROWS:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be {_MOST_ROWS} at most")
    return config


def _most_state_bytes(entry: dict[str, Any]) -> int:
    """Return the most bytes that the file of the state may have; earlier versions do not say how many it has."""
    return most_bytes(_size(entry["bytes"])) if "bytes" in entry else _MOST_STATE_BYTES


def _size(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{number!r} is no size")
    return number


def _state(folder: Path, entry: dict[str, Any], config: QTuningConfig) -> dict[str, Tensor]:
    """Read the state, which must be of the config's sizes, for a model is made by these."""
    state = read_tensors(folder, entry, most_bytes=_most_state_bytes(entry))
    shared = [x for name, x in state.items() if name.endswith("._rows.0.shared")]
    right = len(shared) == 1 and shared[0].shape[:1] == (config.shared_length,)
    if not right or not all(bool(x.isfinite().all()) for x in state.values()):
        raise CorruptFileError(
            f"{folder / entry['file']} does not fit the config in {CONFIG_FILE}, or holds values that are not finite"
        )
    return state


def _rule(content: dict[str, Any]) -> TaskRule:
    """Return the rule that the index names, or the default one; warn if it is a user's own, which is not at hand."""
    if "task_rule" not in content:
        return ClosedForm()
    name, settings = content["task_rule"]["name"], content["task_rule"]["settings"]
    if name in RULES:
        if isinstance(settings.get("size"), int) and settings["size"] > _MOST_ROWS:
            raise ValueError(f"size of the task rule is {settings['size']}; it must be {_MOST_ROWS} at most")
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
