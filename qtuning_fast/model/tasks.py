"""The finished tasks of a model, with their adapters in memory, on disk and in slots on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from qtuning_fast.method.adapter import TaskAdapter
from qtuning_fast.method.config import HEAD_TASK_TYPES, QTuningConfig
from qtuning_fast.method.statistics import TaskStatistics
from qtuning_fast.model.backbone import Backbone
from qtuning_fast.model.checkpoint import Checkpoint, read_checkpoint
from qtuning_fast.model.compatibility import check_adapter, check_stored, chosen_layers
from qtuning_fast.model.device_slots import AdapterSlots, MixedBatch
from qtuning_fast.model.hub_files import Located
from qtuning_fast.model.known_tasks import KnownTasks
from qtuning_fast.model.registry import AdapterRegistry, StatisticsRegistry


class Tasks:
    """Finished tasks, by name.

    Args:
        backbone: model on which the tasks run.
        layers: indices of its layers that get a prefix.
        config: see `QTuningConfig`.
        adapters, statistics: those of tasks finished before.

    Attributes:
        adapters: the registry of the tasks' adapters.
        known: the tasks' statistics, by which the task of an input is inferred.
        slots: the slots on the device for adapters that batches of several tasks use.
    """

    def __init__(
        self,
        backbone: Backbone,
        layers: Sequence[int],
        config: QTuningConfig,
        adapters: AdapterRegistry | None = None,
        statistics: StatisticsRegistry | None = None,
    ) -> None:
        self._backbone = backbone
        self._layers = layers
        self._config = config
        in_input, has_heads = config.placement == "input", config.task_type in HEAD_TASK_TYPES
        self._embedding_size = backbone.embedding_size if in_input else None
        self._hidden_size = backbone.hidden_size if has_heads else None
        self.adapters = AdapterRegistry() if adapters is None else adapters
        shapes = [backbone.injector.layers[index].shape for index in layers]
        self._sizes: dict[str, Any] = {
            "shapes": shapes,
            "embedding_size": self._embedding_size,
            "hidden_size": self._hidden_size,
        }
        self.adapters.check_all(partial(check_stored, **self._sizes))
        self.known = KnownTasks(self.adapters, StatisticsRegistry() if statistics is None else statistics, backbone)
        self.slots = AdapterSlots(
            self.adapters, backbone, layers, embedding_size=self._embedding_size, hidden_size=self._hidden_size
        )

    def check(self, name: str) -> None:
        """Raise a ValueError if no finished task has this name."""
        if name not in self.adapters:
            names = ", ".join(self.adapters) or "none yet"
            raise ValueError(f"task {name!r} is not among the finished tasks: {names}")

    def label_names(self, name: str) -> tuple[str, ...]:
        """Return the classes of a task."""
        self.check(name)
        return self.adapters.entry(name).info.label_names

    def problem_type(self, name: str) -> str:
        """Return what labels of a task mean; raise a ValueError if there is none."""
        self.check(name)
        return self.adapters.entry(name).info.problem_type

    def on_device(self, name: str) -> TaskAdapter:
        """Return the adapter of a task with its head on the device; raise a ValueError if there is none."""
        self.check(name)
        adapter = self.adapters[name]
        if adapter.head_weight is None or adapter.head_bias is None:
            return adapter
        device = self._backbone.device
        return replace(adapter, head_weight=adapter.head_weight.to(device), head_bias=adapter.head_bias.to(device))

    def check_new(self, adapter: TaskAdapter) -> None:
        """Raise a TypeError or ValueError if an adapter does not fit the model or its name is taken."""
        self.check_fits(adapter)
        self.check_new_name(adapter.name)

    def check_fits(self, adapter: TaskAdapter) -> None:
        """Raise a TypeError or ValueError if an adapter does not fit the model."""
        check_adapter(adapter, **self._sizes)

    def check_new_name(self, name: str) -> None:
        """Raise a ValueError if a finished task has this name."""
        if name in self.adapters:
            raise ValueError(f"task {name!r} is finished already; call remove_task first")

    def add(self, adapter: TaskAdapter, statistics: TaskStatistics | None = None) -> None:
        """Add a checked adapter. It stays in the host's memory.

        Raises:
            TypeError, ValueError: the statistics do not fit it.
        """
        if statistics is not None:
            self.known.check(adapter.info, statistics)
        tensors = {name: tensor.detach().cpu() for name, tensor in adapter.tensors().items()}
        self.adapters.add(adapter.info, value=TaskAdapter.from_tensors(tensors, adapter.info))
        if statistics is not None:
            self.known.add(adapter.name, statistics)

    def read(self, source: Located, names: Sequence[str]) -> Checkpoint:
        """Read the index of a checkpoint that fits this model and has these tasks; adapters stay where they are.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint lacks a task, the index is damaged, or the base model or the place of prefixes
                differs.
            HubError: a file cannot be downloaded.
        """
        saved = read_checkpoint(source.folder, lazy=True, elsewhere=source.elsewhere, with_state=False)
        saved.check_base_model(self._backbone, source.name)
        for name in names:
            if name not in saved.adapters:
                known = ", ".join(saved.adapters) or "none"
                raise ValueError(f"task {name!r} is not among those in {source.name}: {known}")
        theirs, ours = saved.config, self._config
        layers = chosen_layers(theirs, self._backbone.injector.layers)
        if theirs.placement != ours.placement or layers != self._layers:
            raise ValueError(
                f"the prefixes in {source.name} have placement={theirs.placement!r}, stack={theirs.stack!r} and "
                f"layers={theirs.layers}, this model's {ours.placement!r}, {ours.stack!r} and {ours.layers}"
            )
        saved.adapters.check, saved.statistics.check = self.adapters.check, self.known.statistics.check
        return saved

    def add_read(self, name: str, saved: Checkpoint, adapter: TaskAdapter | None = None) -> None:
        """Add a task of an index that `read` returned. Its files stay in place.

        Args:
            adapter: its adapter, checked; None: the files are read when they are needed.
        """
        entry, recorded = saved.adapters.entry(name), saved.statistics.find(name)
        statistics = None if adapter is None or recorded is None else saved.statistics.load(recorded)
        if statistics is not None:
            self.known.check(entry.info, statistics)
        self.adapters.add(entry.info, file=entry.file, value=adapter)
        if recorded is not None:
            self.known.statistics.add(recorded.info, file=recorded.file, value=statistics)

    def remove(self, name: str) -> None:
        """Remove a task; raise a ValueError if there is none of this name."""
        self.check(name)
        self.adapters.remove(name)
        self.known.remove(name)
        self.slots.discard(name)

    def set_memory_limits(self, *, device_bytes: int | None, host_bytes: int | None) -> None:
        """See `QTuningModel.set_memory_limits`."""
        for bound, value in (("device_bytes", device_bytes), ("host_bytes", host_bytes)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{bound} is {value!r}; it must be None or an integer")
            if value is not None and value < 1:
                raise ValueError(f"{bound} is {value}; it must be positive")
        self.adapters.host_bytes = host_bytes
        # Statistics are needed all at once, and seldom: those that can be read again do not stay under a bound.
        self.known.statistics.host_bytes = None if host_bytes is None else 0
        self.slots.clear()
        self.slots.device_bytes = device_bytes

    @contextmanager
    def using(self, names: Sequence[str], batch: int) -> Iterator[MixedBatch]:
        """Within the block, make each sample of a batch of this size compute under its own task.

        Raises:
            ValueError: a task is unknown, the number of names differs from `batch`, or one batch cannot hold the tasks.
        """
        if isinstance(names, str) or len(names) != batch:
            raise ValueError(f"task_names is {names!r}; it must hold one name for each of the {batch} samples")
        for name in names:
            self.check(name)
        injector = self._backbone.injector
        with injector.keeping():
            injector.switch()
            mixed = self.slots.batch(names)
            injector.place(self._layers, mixed.prefix)
            yield mixed
