"""Adapters that are added, replaced and removed while serving, in one folder that all replicas read and write.

The folder is what they agree on. It holds an index in the format of a saved model's, without its state, and the files
that it names, called by their content. A change writes files first and then replaces the index, under a lock. Each
replica looks at the index before every batch: what a change answered with success is true for every batch that begins
afterwards, on all replicas, and after a restart. Files that no index names any more stay for a while, for batches that
have begun.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from qtuning_fast.lifelong.tasks import check_template
from qtuning_fast.method.adapter import check_not_reserved
from qtuning_fast.model.checked_files import CorruptFileError, read_json, write_json, write_tensors
from qtuning_fast.model.checkpoint import CONFIG_FILE, FORMAT_VERSION, task_entry
from qtuning_fast.model.model import QTuningModel
from qtuning_fast.model.registry import AdapterFile, StatisticsFile, StatisticsInfo
from qtuning_fast.serving.schema import MOST_CHARACTERS_OF_A_NAME, Refused, SentAdapter

VERSION_CHARACTERS = 12
_KEPT_SECONDS = 600.0
_LOCK_SECONDS = 20.0
_OURS = re.compile(r"(task|statistics)-[0-9a-f]{12}\.safetensors|\..*\.part")


class ServedAdapters:
    """The tasks of a model: those of its run, and what has been added and removed since.

    Args:
        folder: where that is kept.
        model: the model; nothing else adds or removes its tasks.
        most_tasks: how many tasks there may be.
        check_words: raises a ValueError if a language model cannot tell the words for a task's classes apart.
        check_template: raises a ValueError if a template leaves a language model no room for a text.

    Attributes:
        label_words: the words for the classes of tasks that were added to a language model.
        templates: what the model reads of tasks that were added, for those that have a template.
    """

    def __init__(
        self,
        folder: Path,
        model: QTuningModel,
        *,
        most_tasks: int,
        check_words: Callable[[Sequence[str]], object],
        check_template: Callable[[str], object],
    ) -> None:
        self.label_words: dict[str, tuple[str, ...]] = {}
        self.templates: dict[str, str] = {}
        self._check_template = check_template
        self._folder, self._model, self._most_tasks = folder, model, most_tasks
        self._check_words = check_words
        self._own = frozenset(model.tasks)
        self._versions = {name: _version(_own_entry(model, name)) for name in self._own}
        self._seen: tuple[int, ...] | None = None
        self._added: dict[str, dict[str, Any]] = {}  # what the index says of them
        folder.mkdir(parents=True, exist_ok=True)
        model.learning.last_learned = None  # nothing is trained here, so no task is kept for memory retention
        self.refresh()

    @property
    def is_changed(self) -> bool:
        """Whether tasks were added to the run's, replaced or removed."""
        return bool(self._added) or len(self._model.tasks) != len(self._own)

    def is_added(self, name: str) -> bool:
        """Whether the adapter of a task was added while serving."""
        return name in self._added

    def version(self, name: str) -> str:
        """The start of the SHA-256 of all that the index says of a task, except names: another for any change."""
        return self._versions[name]

    def refresh(self) -> None:
        """Make the model's tasks those of the index, if it has changed.

        Raises:
            CorruptFileError: the index is damaged.
        """
        seen = self._signature()
        while seen != self._seen:
            try:
                self._adopt()
            except ValueError:
                before, seen = seen, self._signature()
                if seen == before:  # if not, it was replaced while it was read
                    raise
            else:
                self._seen = seen

    def _adopt(self) -> None:
        """Make the model's tasks those of the index."""
        index = self._index()
        entries = {entry["name"]: entry for entry in index["tasks"]}
        removed, tasks = set(index["removed"]), self._model.tasks
        for name in tasks:
            if self._added.get(name) != entries.get(name) or (name in removed and name not in entries):
                self._model.remove_task(name)
                self._added.pop(name, None)
        coming = [name for name in entries if name not in self._model.adapters]
        if coming:
            self._model.load_tasks(self._folder, coming, lazy=True)
            self._added |= {name: entries[name] for name in coming}
            self._versions |= {name: _version(entries[name]) for name in coming}
        self.label_words = {
            name: tuple(entry["label_words"]) for name, entry in entries.items() if "label_words" in entry
        }
        self.templates = {name: entry["template"] for name, entry in entries.items() if "template" in entry}

    def put(self, name: str, sent: SentAdapter) -> bool:
        """Add an adapter, or replace the one of that name, after all checks of loading it from disk.

        Returns:
            Whether there was a task of this name before.

        Raises:
            Refused: it does not fit this model, is damaged, or there are too many tasks.
        """
        _check_name(name)
        with self._changing() as index, TemporaryDirectory() as folder:
            was_there = name in self._model.adapters
            if not was_there and len(self._model.adapters) >= self._most_tasks:
                raise Refused(409, "name", f"there are {self._most_tasks} tasks already, the most; remove one first")
            entry = self._written(name, sent, Path(folder))
            kept = [each for each in index["tasks"] if each["name"] != name]
            self._write(index | {"tasks": [*kept, entry], "removed": [n for n in index["removed"] if n != name]})
        return was_there

    def remove(self, name: str) -> None:
        """Remove a task for all replicas and for good; the run's own files stay.

        Raises:
            Refused: there is no such task.
        """
        with self._changing() as index:
            if name not in self._model.adapters:
                raise Refused(404, "name", f"task {name!r} is not served")
            kept = [each for each in index["tasks"] if each["name"] != name]
            removed = {*index["removed"], *({name} & self._own)}
            self._write(index | {"tasks": kept, "removed": sorted(removed)})

    # The index

    @property
    def _path(self) -> Path:
        return self._folder / CONFIG_FILE

    def _signature(self) -> tuple[int, ...] | None:
        """What changes whenever the index is replaced. Opening it makes a network file system look anew."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _index(self) -> dict[str, Any]:
        if not self._path.exists():
            return self._heading | {"tasks": [], "removed": []}
        index = read_json(self._path)
        if not isinstance(index.get("removed"), list) or not isinstance(index.get("tasks"), list):
            raise CorruptFileError(f"{self._path} is not an index of served adapters")
        return index

    @property
    def _heading(self) -> dict[str, Any]:
        model = self._model
        base = {"class": type(model.base_model).__name__, "fingerprint": model.backbone.fingerprint}
        config = model.qtuning_config.to_dict()
        return {"format_version": FORMAT_VERSION, "config": config, "base_model": base, "last_learned": None}

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """Within the block, no other replica changes the index, and the model's tasks are those of it."""
        try:
            with FileLock(self._folder / ".lock", timeout=_LOCK_SECONDS):
                self.refresh()
                yield self._index()
                self._sweep()
        except Timeout:
            said = f"another change of {self._folder} has gone on for {_LOCK_SECONDS:.0f} s"
            raise Refused(503, "server", said, retry_after=5) from None

    def _write(self, index: dict[str, Any]) -> None:
        """Replace the index. The files that it drops are dated now, so that `_sweep` keeps them for a while."""
        for name in _files(self._index()) - _files(index):
            with suppress(FileNotFoundError):
                os.utime(self._folder / name)
        write_json(self._path, index)
        self.refresh()

    def _sweep(self) -> None:
        """Delete files that no index has named for a while."""
        named, now = _files(self._index()), time.time()
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                ours = bool(_OURS.fullmatch(path.name)) and path.name not in named
                if ours and now - path.stat().st_mtime > _KEPT_SECONDS:
                    path.unlink()

    # What is sent

    def _written(self, name: str, sent: SentAdapter, folder: Path) -> dict[str, Any]:
        """Check an adapter as one that is loaded from disk, and return the entry of its files, which are in place."""
        theirs = sent.name_in_index or name
        words = _label_words(sent, has_heads=self._model.has_heads)
        try:
            _lay_out(sent, theirs, folder)
            read, statistics = self._model.read_task(folder, theirs)
            adapter = replace(read, name=name)
        except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            said = str(error).replace(f"{folder.resolve()}{os.sep}", "").replace(str(folder.resolve()), "what was sent")
            raise Refused(422, _culprit(said), said) from None
        if self._model.has_heads and adapter.head_weight is None:
            raise Refused(422, "tensors", f"task {theirs!r} has no head, only a prompt, so it gives no answers")
        if words is not None and len(words) != len(adapter.label_names):
            said = f"there are {len(words)} words, but task {theirs!r} has {len(adapter.label_names)} labels"
            raise Refused(422, "label_words", said)
        if not self._model.has_heads:
            words = words or list(adapter.label_names)
            try:
                self._check_words(words)
            except ValueError as error:
                raise Refused(422, "label_words", str(error)) from None
        self._check_sent_template(name, sent.template)
        written = write_tensors(self._folder, "task", adapter.tensors())
        file = AdapterFile(self._folder, written["file"], written["sha256"])
        recorded, its_file = None, None
        if statistics is not None:
            recorded = StatisticsInfo.of(name, statistics)
            written = write_tensors(self._folder, "statistics", statistics.tensors())
            its_file = StatisticsFile(self._folder, written["file"], written["sha256"])
        entry = task_entry(adapter.info, file, recorded, its_file)
        more = {"label_words": words, "template": sent.template}
        return entry | {key: value for key, value in more.items() if value is not None}

    def _check_sent_template(self, name: str, template: str | None) -> None:
        if template is None:
            return
        if self._model.has_heads:
            raise Refused(422, "template", "this model has heads, and reads texts as they are; leave it out")
        try:
            check_template(name, template)
            self._check_template(template)
        except ValueError as error:
            raise Refused(422, "template", str(error)) from None


def _own_entry(model: QTuningModel, name: str) -> dict[str, Any]:
    """What the run's index says of one of its tasks."""
    adapter = model.adapters.entry(name)
    assert adapter.file is not None  # a saved run's model
    if name not in model.statistics:
        return task_entry(adapter.info, adapter.file)
    statistics = model.statistics.entry(name)
    return task_entry(adapter.info, adapter.file, statistics.info, statistics.file)


def _version(entry: dict[str, Any]) -> str:
    """A digest of an entry of an index, without the names of the task and of its files: their content is in it."""
    content = {key: value for key, value in entry.items() if key not in ("name", "file")}
    if "statistics" in content:
        content["statistics"] = {key: value for key, value in content["statistics"].items() if key != "file"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:VERSION_CHARACTERS]


def _files(index: dict[str, Any]) -> set[str]:
    """The files that an index names."""
    of_statistics = {entry["statistics"]["file"] for entry in index["tasks"] if "statistics" in entry}
    return {entry["file"] for entry in index["tasks"]} | of_statistics


def _check_name(name: str) -> None:
    if not name or len(name) > MOST_CHARACTERS_OF_A_NAME or not name.isprintable() or name != name.strip():
        said = f"a task's name has 1 to {MOST_CHARACTERS_OF_A_NAME} printable characters, and no space at its ends"
        raise Refused(422, "name", said)
    try:
        check_not_reserved(name)
    except ValueError as error:
        raise Refused(422, "name", str(error)) from None


def _label_words(sent: SentAdapter, *, has_heads: bool) -> list[str] | None:
    """Return a language model's words for the classes, if some were sent."""
    if sent.label_words is None:
        return None
    if has_heads:
        raise Refused(422, "label_words", "this model has heads, not words; leave it out")
    try:
        words = json.loads(sent.label_words)
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise Refused(422, "label_words", 'it must be a JSON list of words, such as ["bad", "good"]')
    return words


def _lay_out(sent: SentAdapter, name: str, folder: Path) -> None:
    """Write what was sent as a saved model of one task, in files whose names are chosen here.

    Raises:
        LookupError, TypeError, ValueError: the index is damaged, or has no such task.
    """
    (folder / CONFIG_FILE).write_bytes(sent.index)
    index = read_json(folder / CONFIG_FILE)
    try:
        found = [entry for entry in index["tasks"] if entry["name"] == name]
        names = ", ".join(str(entry["name"]) for entry in index["tasks"][:10])
    except (LookupError, TypeError):
        raise ValueError(f"{CONFIG_FILE} is not an index of a saved model") from None
    if len(found) != 1:
        raise ValueError(f"the index has no task {name!r}, but {names or 'none'}; say which with name_in_index")
    entry: dict[str, Any] = {**found[0], "file": "task-000000000000.safetensors"}
    (folder / entry["file"]).write_bytes(sent.tensors)
    recorded = entry.pop("statistics", None)
    if sent.statistics is not None:
        if recorded is None:
            raise ValueError("statistics were sent, but the index has none of this task; leave them out")
        entry["statistics"] = {**recorded, "file": "statistics-000000000000.safetensors"}
        (folder / entry["statistics"]["file"]).write_bytes(sent.statistics)
    write_json(folder / CONFIG_FILE, {**index, "tasks": [entry], "last_learned": None})


def _culprit(said: str) -> str:
    """The part of a request that a message of loading is about."""
    for part in ("statistics", "tensors", CONFIG_FILE):
        if part in said:
            return "index" if part == CONFIG_FILE else part
    return "tensors" if "task-0000" in said or "adapter" in said else "index"
