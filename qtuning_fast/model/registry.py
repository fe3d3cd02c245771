"""The registry of a model's adapters by task name: in memory, or on disk until needed."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachetools import LRUCache

from qtuning_fast.method.adapter import AdapterInfo, TaskAdapter
from qtuning_fast.model.checked_files import CorruptFileError, file_digest, read_tensors


@dataclass
class AdapterFile:
    """The file of an adapter's tensors: its folder, its name and its SHA-256."""

    folder: Path
    file: str
    sha256: str
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

    def read(self, info: AdapterInfo) -> TaskAdapter:
        """Read the adapter.

        Raises:
            CorruptFileError: the file is missing, differs from what was written, or holds another adapter.
        """
        try:
            tensors = read_tensors(self.folder, {"file": self.file, "sha256": self.sha256})
            adapter = TaskAdapter.from_tensors(tensors, info)
            if adapter.info != info or info.classes not in (0, len(info.label_names)):
                raise CorruptFileError(f"{self.folder / self.file} does not hold what its index says, {info}")
        except (CorruptFileError, LookupError, AttributeError, OSError) as error:
            raise CorruptFileError(f"the adapter of task {info.name!r} cannot be read: {error}") from None
        return adapter


class StoredAdapter:
    """One adapter of a registry. The entry stays the same object until the task is removed.

    Attributes:
        info: the adapter's description.
        file: file of its tensors; None while they are only in memory.
        adapter: the adapter in memory; None while it is only on disk.
    """

    def __init__(self, info: AdapterInfo, file: AdapterFile | None, adapter: TaskAdapter | None) -> None:
        self.info = info
        self.file = file
        self.adapter = adapter


class _ReadAgain(LRUCache[StoredAdapter, TaskAdapter]):
    """A cache of adapters that have a file; it drops the least recently used ones, which can be read again."""

    @staticmethod
    def getsizeof(value: TaskAdapter) -> int:  # a function handed to the constructor could not be pickled
        return value.info.bytes

    def popitem(self) -> tuple[StoredAdapter, TaskAdapter]:
        entry, adapter = super().popitem()
        entry.adapter = None
        return entry, adapter

    def keep(self, entry: StoredAdapter, adapter: TaskAdapter) -> None:
        """Keep an adapter if it fits."""
        entry.adapter = None
        with suppress(ValueError):  # larger than the whole cache
            self[entry] = adapter
            entry.adapter = adapter

    def moved_to(self, other: _ReadAgain) -> _ReadAgain:
        """Copy the adapters to another cache, in the same order of use, and return it."""
        while self:
            other.keep(*super().popitem())
        return other


class AdapterRegistry(Mapping[str, TaskAdapter]):
    """Adapters by task name, in the order of their addition.

    The mapping is read-only; `QTuningModel.add_task` and `remove_task` change it and check that adapters fit. An
    adapter with a file is read and verified on first use. Under a bound on memory, the least recently used adapters
    with a file are dropped; those without one stay. Several threads may use a registry at once.

    Args:
        host_bytes: bound on the bytes of adapters in memory; None: no bound.
    """

    def __init__(self, *, host_bytes: int | None = None) -> None:
        self._host_bytes = host_bytes
        self._entries: dict[str, StoredAdapter] = {}
        self._read_again = _ReadAgain(math.inf)
        self._lock = threading.RLock()
        self._make_room()

    # As a mapping

    def __getitem__(self, name: str) -> TaskAdapter:
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
        """The bound on the bytes of adapters in memory; None: no bound."""
        return self._host_bytes

    @host_bytes.setter
    def host_bytes(self, host_bytes: int | None) -> None:
        with self._lock:
            self._host_bytes = host_bytes
            self._make_room()

    @property
    def bytes_in_memory(self) -> int:
        """The size of the adapters in memory, in bytes."""
        with self._lock:
            return int(self._read_again.currsize) + self._unsaved_bytes

    @property
    def _unsaved_bytes(self) -> int:
        return sum(entry.info.bytes for entry in self._entries.values() if entry.file is None)

    def entry(self, name: str) -> StoredAdapter:
        """Return the entry of a task; raise a KeyError if there is none."""
        return self._entries[name]

    def entries(self) -> list[StoredAdapter]:
        """Return all entries, in order."""
        with self._lock:
            return list(self._entries.values())

    def add(
        self, info: AdapterInfo, *, file: AdapterFile | None = None, adapter: TaskAdapter | None = None
    ) -> StoredAdapter:
        """Add an entry with a file or an adapter in memory; it replaces one of the same name."""
        entry = StoredAdapter(info, file, adapter)
        with self._lock:
            if info.name in self._entries:
                self._read_again.pop(self._entries[info.name], None)
            self._entries[info.name] = entry
            self._make_room()
            if file is not None and adapter is not None:
                self._read_again.keep(entry, adapter)
        return entry

    def remove(self, name: str) -> None:
        """Remove a task; raise a KeyError if there is none of this name."""
        with self._lock:
            self._read_again.pop(self._entries.pop(name), None)
            self._make_room()

    def load(self, entry: StoredAdapter, *, keep: bool = True) -> TaskAdapter:
        """Return the adapter of an entry, reading it if necessary.

        Args:
            keep: whether to keep an adapter that was read in memory, within the bound.

        Raises:
            CorruptFileError: its file is missing or damaged.
        """
        with self._lock:
            adapter, file = entry.adapter, entry.file
            if adapter is not None:
                self._read_again.get(entry)  # mark as used
                return adapter
        assert file is not None
        adapter = file.read(entry.info)  # without the lock, so that others need not wait; two may read the same file
        with self._lock:
            if keep and self._entries.get(entry.info.name) is entry:
                self._read_again.keep(entry, adapter)
        return adapter

    def lies_in(self, entry: StoredAdapter, file: AdapterFile) -> None:
        """Record the file of an adapter that was only in memory, or its new file in the same folder."""
        with self._lock:
            was_unsaved = entry.file is None
            if was_unsaved or (entry.file is not None and entry.file.folder == file.folder):
                entry.file = file
            self._make_room()
            if was_unsaved and entry.adapter is not None:
                self._read_again.keep(entry, entry.adapter)

    def _make_room(self) -> None:
        """Shrink the cache by the size of the adapters without a file, which cannot be dropped."""
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
