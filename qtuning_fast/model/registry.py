"""The adapters of a model by name: in memory, or on disk until one is needed."""

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
    """Where an adapter's tensors lie: a file in a folder, and its SHA-256."""

    folder: Path
    file: str
    sha256: str
    _seen_whole: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def is_whole(self) -> bool:
        """Whether the file is there and what was written.

        It is read through once, and again when its size or times have changed since: a save asks this of every adapter,
        and would otherwise take longer with each task. Whoever reads the tensors checks them whatever is known here.
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
        """The adapter.

        Raises:
            CorruptFileError: the file is missing, not what was written, or of another adapter.
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
    """One adapter of a registry. It stays the same object until the task is removed, read and dropped as it may be.

    Attributes:
        info: what is known without its tensors.
        file: where they lie; None while they are in memory only.
        adapter: them, or None while they are on disk only.
    """

    def __init__(self, info: AdapterInfo, file: AdapterFile | None, adapter: TaskAdapter | None) -> None:
        self.info = info
        self.file = file
        self.adapter = adapter


class _ReadAgain(LRUCache[StoredAdapter, TaskAdapter]):
    """Adapters in memory that have a file: the least recently used ones are dropped, to be read again."""

    def __init__(self, maxsize: float) -> None:
        super().__init__(maxsize, getsizeof=lambda adapter: adapter.info.bytes)

    def popitem(self) -> tuple[StoredAdapter, TaskAdapter]:
        entry, adapter = super().popitem()
        entry.adapter = None
        return entry, adapter

    def keep(self, entry: StoredAdapter, adapter: TaskAdapter) -> None:
        """As far as there is room."""
        entry.adapter = None
        with suppress(ValueError):  # larger than all room
            self[entry] = adapter
            entry.adapter = adapter

    def moved_to(self, other: _ReadAgain) -> _ReadAgain:
        """The same in another, in the same order of use."""
        while self:
            other.keep(*super().popitem())
        return other


class AdapterRegistry(Mapping[str, TaskAdapter]):
    """Adapters by the names of their tasks, in the order in which they came.

    A mapping to read; `QTuningModel` has `add_task` and `remove_task`, which see to it that all fits. What has a file
    is read, checksum and all, when it is first asked for; under a bound on memory the least recently used ones that
    have a file are dropped again. What has none stays. Several threads may use a registry at once.

    Args:
        host_bytes: how many bytes of adapters are kept in memory; None: any number.
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

    # What a mapping does not know

    @property
    def host_bytes(self) -> int | None:
        """How many bytes of adapters are kept in memory; None: any number."""
        return self._host_bytes

    @host_bytes.setter
    def host_bytes(self, host_bytes: int | None) -> None:
        with self._lock:
            self._host_bytes = host_bytes
            self._make_room()

    @property
    def bytes_in_memory(self) -> int:
        """Of the adapters that are in memory now."""
        with self._lock:
            return int(self._read_again.currsize) + self._unsaved_bytes

    @property
    def _unsaved_bytes(self) -> int:
        return sum(entry.info.bytes for entry in self._entries.values() if entry.file is None)

    def entry(self, name: str) -> StoredAdapter:
        """The entry of a task; a KeyError where there is none."""
        return self._entries[name]

    def entries(self) -> list[StoredAdapter]:
        """All, in order."""
        with self._lock:
            return list(self._entries.values())

    def add(
        self, info: AdapterInfo, *, file: AdapterFile | None = None, adapter: TaskAdapter | None = None
    ) -> StoredAdapter:
        """A new entry, from a file or from memory, in the place of one of the same name."""
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
        """Without this task from here on; a KeyError where there is none."""
        with self._lock:
            self._read_again.pop(self._entries.pop(name), None)
            self._make_room()

    def load(self, entry: StoredAdapter, *, keep: bool = True) -> TaskAdapter:
        """The adapter of an entry, read if need be.

        Args:
            keep: whether what is read stays in memory, as far as the bound allows.

        Raises:
            CorruptFileError: its file is missing or damaged.
        """
        with self._lock:
            adapter, file = entry.adapter, entry.file
            if adapter is not None:
                self._read_again.get(entry)  # used just now
                return adapter
        assert file is not None
        adapter = file.read(entry.info)  # not under the lock: others need not wait, and two may read the same
        with self._lock:
            if keep and self._entries.get(entry.info.name) is entry:
                self._read_again.keep(entry, adapter)
        return adapter

    def lies_in(self, entry: StoredAdapter, file: AdapterFile) -> None:
        """What was in memory only has a file from here on; what had one in that folder, a new one."""
        with self._lock:
            was_unsaved = entry.file is None
            if was_unsaved or (entry.file is not None and entry.file.folder == file.folder):
                entry.file = file
            self._make_room()
            if was_unsaved and entry.adapter is not None:
                self._read_again.keep(entry, entry.adapter)

    def _make_room(self) -> None:
        """What has no file takes its room first."""
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
