"""Registries by task name of a model's adapters and of its tasks' statistics: in memory, or on disk until needed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from cachetools import LRUCache
from torch import Tensor

from qtuning_fast.method.adapter import AdapterInfo, TaskAdapter
from qtuning_fast.method.statistics import TaskStatistics
from qtuning_fast.model.checked_files import CorruptFileError, file_digest, read_tensors


class _Info(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int: ...


class _Value(Protocol):
    def tensors(self) -> dict[str, Tensor]: ...


Info = TypeVar("Info", bound=_Info)
Value = TypeVar("Value", bound=_Value)

_HEADER = 1 << 20  # bytes that the names and shapes in a file of tensors may take


class FilesElsewhere(Protocol):
    """Files that come into a folder when they are needed (`qtuning_fast.model.hub_files.HubFiles`)."""

    def fetch(self, most_bytes: Mapping[str, int]) -> None:
        """Bring files into the folder unless they are there; refuse those larger than these bounds."""


def most_bytes(tensor_bytes: int) -> int:
    """Return the most bytes that a file of tensors of this size may have."""
    return tensor_bytes + _HEADER


@dataclass(frozen=True)
class StatisticsInfo:
    """The description of a task's statistics.

    Attributes:
        name: name of the task.
        classes: C; free text is one class.
        feature_maps: the names of the feature maps whose moments they hold.
        bytes: size of all tensors.
    """

    name: str
    classes: int
    feature_maps: tuple[str, ...]
    bytes: int

    @classmethod
    def of(cls, name: str, statistics: TaskStatistics) -> StatisticsInfo:
        """Return the description of a task's statistics."""
        size = sum(tensor.nbytes for tensor in statistics.tensors().values())
        return cls(name, statistics.classes, tuple(sorted(statistics.moments)), size)


@dataclass
class StoredFile(Generic[Info, Value]):
    """The file of an entry's tensors: its folder, its name and its SHA-256.

    Attributes:
        elsewhere: from where the file comes when it is needed; None: it is in the folder.
    """

    folder: Path
    file: str
    sha256: str
    elsewhere: FilesElsewhere | None = field(default=None, repr=False, compare=False)
    _seen_whole: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def is_whole(self) -> bool:
        """Return whether the file exists and is intact.

        The file is read once, and again only if its size or times have changed: a save checks every adapter and would
        otherwise slow down with each task. Reading the tensors verifies them in any case.
        """
        path = self.folder / self.file
        if not path.is_file():
            return False
        status = path.stat()
        seen = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        if seen != self._seen_whole:
            self._seen_whole = seen if file_digest(path) == self.sha256 else None
        return self._seen_whole is not None

    def read(self, info: Info) -> Value:
        """Read the value.

        Raises:
            CorruptFileError: the file is missing, differs from what was written, or holds something else.
            HubError: the file cannot be downloaded.
        """
        limit, entry = most_bytes(info.bytes), {"file": self.file, "sha256": self.sha256}
        if self.elsewhere is not None:
            self.elsewhere.fetch({self.file: limit})
        try:
            tensors = read_tensors(self.folder, entry, most_bytes=limit)
        except (CorruptFileError, OSError) as error:
            raise CorruptFileError(self._unreadable(info, str(error))) from None
        try:
            return self._rebuilt(tensors, info)
        except CorruptFileError as error:
            raise CorruptFileError(self._unreadable(info, str(error))) from None
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise CorruptFileError(self._unreadable(info, f"{self.folder / self.file}: {error}")) from None

    def _unreadable(self, info: Info, why: str) -> str:
        again = "" if self.elsewhere is None else "; download it again with force_download=True"
        return f"the {self._kind} of task {info.name!r} cannot be read: {why}{again}"

    _kind = ""

    def _rebuilt(self, tensors: dict[str, Tensor], info: Info) -> Value:
        """Return the value, or raise a ValueError if the tensors are not what the index says."""
        raise NotImplementedError

    def _check(self, found: Info, info: Info, *, right: bool = True) -> None:
        if found != info or not right:
            raise CorruptFileError(f"{self.folder / self.file} does not hold what its index says, {info}")


class AdapterFile(StoredFile[AdapterInfo, TaskAdapter]):
    """The file of an adapter."""

    _kind = "adapter"

    def _rebuilt(self, tensors: dict[str, Tensor], info: AdapterInfo) -> TaskAdapter:
        adapter = TaskAdapter.from_tensors(tensors, info)
        self._check(adapter.info, info, right=info.classes in (0, len(info.label_names)))
        return adapter


class StatisticsFile(StoredFile[StatisticsInfo, TaskStatistics]):
    """The file of a task's statistics."""

    _kind = "statistics"

    def _rebuilt(self, tensors: dict[str, Tensor], info: StatisticsInfo) -> TaskStatistics:
        statistics = TaskStatistics.from_tensors(tensors)
        self._check(StatisticsInfo.of(info.name, statistics), info)
        return statistics


class Stored(Generic[Info, Value]):
    """One entry of a registry. It stays the same object until the task is removed.

    Attributes:
        info: the description of the value.
        file: the file of its tensors; None while they are only in memory.
        value: the value in memory; None while it is only on disk.
    """

    def __init__(self, info: Info, file: StoredFile[Info, Value] | None, value: Value | None) -> None:
        self.info = info
        self.file = file
        self.value = value


class _ReadAgain(LRUCache[Stored[Any, Any], Any]):
    """A cache of values that have a file; it drops the least recently used ones, which can be read again."""

    @staticmethod
    def getsizeof(value: _Value) -> int:  # a function handed to the constructor could not be pickled
        return sum(tensor.nbytes for tensor in value.tensors().values())

    def popitem(self) -> tuple[Stored[Any, Any], Any]:
        entry, value = super().popitem()
        entry.value = None
        return entry, value

    def keep(self, entry: Stored[Any, Any], value: _Value) -> None:
        """Keep a value if it fits."""
        entry.value = None
        with suppress(ValueError):  # larger than the whole cache
            self[entry] = value
            entry.value = value

    def moved_to(self, other: _ReadAgain) -> _ReadAgain:
        """Copy the values to another cache, in the same order of use, and return it."""
        while self:
            other.keep(*super().popitem())
        return other


class Registry(Mapping[str, Value], Generic[Info, Value]):
    """Adapters or statistics by task name, in the order of their addition.

    The mapping is read-only; `QTuningModel.add_task` and `remove_task` change it and check that adapters fit. A value
    with a file is read and verified on first use. Under a bound on memory, the least recently used values with a file
    are dropped; those without one stay. Several threads may use a registry at once.

    Args:
        host_bytes: bound on the bytes of values in memory; None: no bound.

    Attributes:
        version: a number that changes whenever an entry comes or goes.
        check: called with the description and the value of what was read from a file; raises a TypeError or ValueError
            if it does not fit the model. It can be pickled.
    """

    def __init__(self, *, host_bytes: int | None = None) -> None:
        self._host_bytes = host_bytes
        self._entries: dict[str, Stored[Info, Value]] = {}
        self._read_again = _ReadAgain(math.inf)
        self.version = 0
        self.check: Callable[[Info, Value], None] | None = None
        self._lock = threading.RLock()
        self._make_room()

    # As a mapping

    def __getitem__(self, name: str) -> Value:
        return self.load(self.entry(name))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    # Beyond a mapping

    @property
    def host_bytes(self) -> int | None:
        """The bound on the bytes of values in memory; None: no bound."""
        return self._host_bytes

    @host_bytes.setter
    def host_bytes(self, host_bytes: int | None) -> None:
        with self._lock:
            self._host_bytes = host_bytes
            self._make_room()

    @property
    def bytes_in_memory(self) -> int:
        """The size of the values in memory, in bytes."""
        with self._lock:
            return int(self._read_again.currsize) + self._unsaved_bytes

    @property
    def _unsaved_bytes(self) -> int:
        return sum(entry.info.bytes for entry in self._entries.values() if entry.file is None)

    def entry(self, name: str) -> Stored[Info, Value]:
        """Return the entry of a task; raise a KeyError if there is none."""
        return self._entries[name]

    def find(self, name: str) -> Stored[Info, Value] | None:
        """Return the entry of a task; None if there is none."""
        return self._entries.get(name)

    def entries(self) -> list[Stored[Info, Value]]:
        """Return all entries, in order."""
        with self._lock:
            return list(self._entries.values())

    def add(
        self, info: Info, *, file: StoredFile[Info, Value] | None = None, value: Value | None = None
    ) -> Stored[Info, Value]:
        """Add an entry with a file or a value in memory; it replaces one of the same name."""
        entry = Stored(info, file, value)
        with self._lock:
            if info.name in self._entries:
                self._read_again.pop(self._entries[info.name], None)
            self._entries[info.name] = entry
            self.version += 1
            self._make_room()
            if file is not None and value is not None:
                self._read_again.keep(entry, value)
        return entry

    def remove(self, name: str) -> None:
        """Remove a task; raise a KeyError if there is none of this name."""
        with self._lock:
            self._read_again.pop(self._entries.pop(name), None)
            self.version += 1
            self._make_room()

    def load(self, entry: Stored[Info, Value], *, keep: bool = True) -> Value:
        """Return the value of an entry, reading it if necessary.

        Args:
            keep: whether to keep a value that was read in memory, within the bound.

        Raises:
            CorruptFileError: its file is missing or damaged.
        """
        with self._lock:
            value, file = entry.value, entry.file
            if value is not None:
                self._read_again.get(entry)  # mark as used
                return value
        assert file is not None
        value = file.read(entry.info)  # without the lock, so that others need not wait; two may read the same file
        self._check_read(entry, value)
        with self._lock:
            if keep and self._entries.get(entry.info.name) is entry:
                self._read_again.keep(entry, value)
        return value

    def load_all(self) -> None:
        """Read every value that is not in memory; see `load`."""
        for entry in self.entries():
            self.load(entry)

    def most_bytes_by_file(self) -> dict[str, int]:
        """Return the most bytes that each file may have, by its name."""
        return {entry.file.file: most_bytes(entry.info.bytes) for entry in self.entries() if entry.file is not None}

    def check_all(self, check: Callable[[Info, Value], None]) -> None:
        """Check what is in memory, and from now on what is read; see `check`.

        Raises:
            CorruptFileError: a value that was read does not fit.
        """
        self.check = check
        for entry in self.entries():
            if entry.file is not None and entry.value is not None:
                self._check_read(entry, entry.value)

    def _check_read(self, entry: Stored[Info, Value], value: Value) -> None:
        file = entry.file
        try:
            if self.check is not None:
                self.check(entry.info, value)
        except (TypeError, ValueError) as error:
            raise CorruptFileError(str(error) if file is None else f"{file.folder / file.file}: {error}") from None

    def copied(self, name: str | None = None) -> Self:
        """Return a registry with the same values, or that of one task alone, whose files may come to lie elsewhere."""
        other = type(self)()
        for entry in self.entries():
            if name in (None, entry.info.name):
                other.add(entry.info, file=entry.file, value=entry.value)
        return other

    def lies_in(self, entry: Stored[Info, Value], file: StoredFile[Info, Value]) -> None:
        """Record the file of a value that was only in memory, or its new file in the same folder."""
        with self._lock:
            was_unsaved = entry.file is None
            if was_unsaved or (entry.file is not None and entry.file.folder == file.folder):
                entry.file = file
            self._make_room()
            if was_unsaved and entry.value is not None:
                self._read_again.keep(entry, entry.value)

    def _make_room(self) -> None:
        """Shrink the cache by the size of the values without a file, which cannot be dropped."""
        room = math.inf if self._host_bytes is None else max(0, self._host_bytes - self._unsaved_bytes)
        if room != self._read_again.maxsize:
            self._read_again = self._read_again.moved_to(_ReadAgain(room))

    # Locks are neither copied nor pickled.

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()


class AdapterRegistry(Registry[AdapterInfo, TaskAdapter]):
    """The adapters of a model's finished tasks."""


class StatisticsRegistry(Registry[StatisticsInfo, TaskStatistics]):
    """The statistics of a model's finished tasks, by which the task of an input is inferred."""
