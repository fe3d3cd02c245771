"""A frozen model with the adapters of finished tasks: which there are, how much memory they take, and mixed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qtuning_fast.adapter import TaskAdapter
from qtuning_fast.bank import AdapterBank, MixedBatch
from qtuning_fast.compatibility import check_adapter, check_task_type, chosen_layers
from qtuning_fast.config import HEAD_TASK_TYPES, QTuningConfig
from qtuning_fast.fingerprint import fingerprint
from qtuning_fast.frozen import FrozenModel
from qtuning_fast.pretrained import SavedModel, read_saved
from qtuning_fast.store import AdapterStore


class FinishedTasksModel(FrozenModel):
    """What `QTuningModel` knows of its finished tasks.

    Args:
        base_model, config: see `QTuningModel`.

    Attributes:
        adapters: of the finished tasks, a mapping by name (`AdapterStore`).
        bank: those that batches of several tasks have used of late, on the device.
    """

    def __init__(self, base_model: PreTrainedModel, config: QTuningConfig) -> None:
        if not isinstance(config, QTuningConfig):
            raise TypeError(f"config is a {type(config).__name__}; it must be a QTuningConfig")
        super().__init__(base_model, config.placement)
        try:
            check_task_type(config.task_type, self.base_model, causal=self.attention.is_causal)
            self.layer_indices = chosen_layers(config, self.attention.layers)
        except ValueError:
            self.detach()
            raise
        self.qtuning_config = config
        self._use(AdapterStore())

    def _use(self, adapters: AdapterStore) -> None:
        """These are the model's adapters from here on."""
        self.adapters = adapters
        self.bank = AdapterBank(adapters, self, self.layer_indices, **self._sizes)

    @property
    def tasks(self) -> list[str]:
        """Names of the finished tasks, in order."""
        return list(self.adapters)

    @property
    def has_heads(self) -> bool:
        """Whether each task has a head of its own; otherwise the base model's language modelling head is used."""
        return self.qtuning_config.task_type in HEAD_TASK_TYPES

    @property
    def vocabulary(self) -> nn.Embedding | None:
        """The embedding of words, where the model reads words."""
        words = self.encoder.get_input_embeddings()
        return words if isinstance(words, nn.Embedding) else None

    @property
    def embedding_size(self) -> int:
        """Length of one embedding in front of the input."""
        return self.hidden_size if self.vocabulary is None else self.vocabulary.embedding_dim

    def label_names(self, name: str) -> tuple[str, ...]:
        """The classes of a finished task."""
        self._check_finished(name)
        return self.adapters.entry(name).info.label_names

    def add_task(self, adapter: TaskAdapter) -> None:
        """Take in an adapter that was made elsewhere, for this base model, as a finished task.

        Neither the queue nor the live prefix know of it.

        Raises:
            TypeError, ValueError: it does not fit this model, or there is a task of its name.
        """
        self._check_new(adapter)
        tensors = {name: tensor.detach().cpu() for name, tensor in adapter.tensors().items()}
        self.adapters.add(adapter.info, adapter=TaskAdapter.from_tensors(tensors, adapter.info))

    def load_task(self, folder: str | Path, name: str) -> None:
        """Take in one adapter of a model that `save_pretrained` wrote, of the same base model, as a finished task.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: there is no such task, a file is damaged, it was made for another base model or put its prefixes
                elsewhere, or a task of this name is there.
        """
        folder = Path(folder)
        saved = read_saved(folder, lazy=True)
        self._check_base_model(saved, folder)
        if name not in saved.adapters:
            raise ValueError(f"task {name!r} is not among those in {folder}: {', '.join(saved.adapters) or 'none'}")
        theirs, ours = saved.config, self.qtuning_config
        if theirs.placement != ours.placement or chosen_layers(theirs, self.attention.layers) != self.layer_indices:
            raise ValueError(
                f"the prefixes in {folder} have placement={theirs.placement!r}, stack={theirs.stack!r} and "
                f"layers={theirs.layers}, this model's {ours.placement!r}, {ours.stack!r} and {ours.layers}"
            )
        entry = saved.adapters.entry(name)
        adapter = saved.adapters.load(entry)
        self._check_new(adapter)
        self.adapters.add(entry.info, file=entry.file, adapter=adapter)

    def remove_task(self, name: str) -> None:
        """Forget a finished task; one of the same name may come in its place. Other tasks stay as they are.

        Raises:
            ValueError: no finished task of this name.
        """
        self._check_finished(name)
        self.adapters.remove(name)
        self.bank.discard(name)

    def set_memory_limits(self, *, device_bytes: int | None = None, host_bytes: int | None = None) -> None:
        """Bound what adapters take in memory; None is no bound.

        Args:
            device_bytes: of the slots for batches of several tasks, on the model's device. A batch that names more
                tasks than have room is refused.
            host_bytes: of the adapters in the host's memory. Those used least of late that lie on disk are dropped and
                read again when they are needed; what was never saved stays, whatever the bound.

        Raises:
            TypeError, ValueError: a bound is no positive integer.
        """
        for bound, value in (("device_bytes", device_bytes), ("host_bytes", host_bytes)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{bound} is {value!r}; it must be None or an integer")
            if value is not None and value < 1:
                raise ValueError(f"{bound} is {value}; it must be positive")
        self.adapters.host_bytes = host_bytes
        self.bank.clear()
        self.bank.device_bytes = device_bytes

    @contextmanager
    def using(self, task_names: Sequence[str], batch: int) -> Iterator[MixedBatch]:
        """Within the block each sample of a batch of this size computes under its own finished task.

        Raises:
            ValueError: a task is unknown, there is not one name a sample, or the tasks do not go together.
        """
        self.check_attached()
        if isinstance(task_names, str) or len(task_names) != batch:
            raise ValueError(f"task_names is {task_names!r}; it must hold one name for each of the {batch} samples")
        for name in task_names:
            self._check_finished(name)
        with self.attention.keeping():
            self.attention.switch()
            mixed = self.bank.batch(task_names)
            self.attention.place(self.layer_indices, mixed.prefix)
            yield mixed

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # to(), cuda(), half(): the slots are made anew where the model is then.
        self.bank.clear()
        return super()._apply(*args, **kwargs)

    @property
    def _sizes(self) -> dict[str, int | None]:
        """Of what stands in adapters beside the rows of layers."""
        in_input = self.qtuning_config.placement == "input"
        return {
            "embedding_size": self.embedding_size if in_input else None,
            "hidden_size": self.hidden_size if self.has_heads else None,
        }

    def _check_finished(self, name: str) -> None:
        if name not in self.adapters:
            raise ValueError(f"task {name!r} is not among the finished tasks: {', '.join(self.tasks) or 'none yet'}")

    def _check_new(self, adapter: TaskAdapter) -> None:
        check_adapter(adapter, [self.attention.layers[index].shape for index in self.layer_indices], **self._sizes)
        if adapter.name in self.adapters:
            raise ValueError(f"a task {adapter.name!r} is finished already; remove_task comes first")

    def _check_base_model(self, saved: SavedModel, folder: Path) -> None:
        dtype = self.base_model.dtype
        if fingerprint(self.attention.model) != saved.fingerprint:
            raise ValueError(
                f"{folder} was made for another base model: a {saved.base_model} with the fingerprint "
                f"{saved.fingerprint[:12]}, not this {type(self.base_model).__name__} in {dtype}"
                + (" (load it in float32 or bfloat16)" if dtype == torch.float16 else "")
            )
