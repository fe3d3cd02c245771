"""A frozen model with finished tasks: which there are, what their adapters take in memory, and what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from qtuning_fast.method.adapter import TaskAdapter
from qtuning_fast.method.config import HEAD_TASK_TYPES, QTuningConfig
from qtuning_fast.method.prompts import Prefix
from qtuning_fast.model.backbone import FrozenModel
from qtuning_fast.model.checkpoint import SavedModel, read_saved
from qtuning_fast.model.compatibility import check_adapter, check_task_type, chosen_layers
from qtuning_fast.model.device_slots import AdapterBank, MixedBatch
from qtuning_fast.model.fingerprint import fingerprint
from qtuning_fast.model.registry import AdapterStore


@dataclass
class QTuningOutput(ModelOutput):
    """Output of a forward pass under a task.

    Attributes:
        loss: cross entropy plus η times the retention loss; None without labels.
        logits: `[B, classes]`; with `task_names` of several tasks `[B, most classes]`, −inf beyond a task's own.
        retention_loss: `L_MR`; None where memory retention is not due.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    retention_loss: Tensor | None = None


class FinishedTasksModel(FrozenModel):
    """What `QTuningModel` knows of its finished tasks.

    Args:
        base_model, config: see `QTuningModel`.

    Attributes:
        adapters: of the finished tasks, a mapping by name (`AdapterStore`).
        bank: those that batches of several tasks have used of late, on the device.
    """

    # The task that is set: its name, and whether it runs under the live prefix.
    _active: tuple[str, bool] | None = None

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
    def active_task(self) -> str | None:
        """The task that is set."""
        return None if self._active is None else self._active[0]

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

    def set_task(self, name: str | None) -> None:
        """Compute under this finished task from here on; None for the base model alone, by its own attention.

        Raises:
            ValueError: no task of this name.
        """
        if name is not None:
            self._check_finished(name)
        self._set(name, live=False)

    def _set(self, name: str | None, *, live: bool) -> None:
        if name is None:
            self._active = None
            self.attention.restore()
            return
        self._check_attached()
        with self._undone_by_errors():
            self._active = name, live
            self.attention.switch()
            self._place()

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
        self._check_attached()
        if isinstance(task_names, str) or len(task_names) != batch:
            raise ValueError(f"task_names is {task_names!r}; it must hold one name for each of the {batch} samples")
        for name in task_names:
            self._check_finished(name)
        with self.attention.keeping():
            self.attention.switch()
            mixed = self.bank.batch(task_names)
            self.attention.place(self.layer_indices, mixed.prefix)
            yield mixed

    # Computing

    def _check_inputs(self, inputs: dict[str, Any], *, under_a_task: bool) -> None:
        if inputs.get("output_attentions"):
            raise ValueError("output_attentions=True: attention weights are never formed; use the model after detach()")
        if not under_a_task:
            return
        if inputs.get("return_dict") is False:
            raise ValueError("return_dict=False: under a task the output has names")
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; under a task it must be [B, N]")

    def _compute(self, inputs: dict[str, Any], labels: Tensor | None, mixed: MixedBatch | None = None) -> Any:
        """Loss and logits under what stands on the attention layers."""
        if not self.has_heads:
            # A checkpoint computes layers twice, which would write twice into a cache.
            cache = {"use_cache": False} if self.attention.checkpoints else {}
            return self.base_model(**(cache | inputs), **({} if labels is None else {"labels": labels}))
        features = self.encode(inputs)
        logits = self._logits(features) if mixed is None else mixed.logits(features)
        if mixed is not None and labels is not None:
            mixed.check_labels(labels)
        return QTuningOutput(loss=None if labels is None else F.cross_entropy(logits.float(), labels), logits=logits)

    def _logits(self, features: Tensor) -> Tensor:
        assert self._active is not None
        return self.adapters[self._active[0]].logits(features)

    def _read(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What of the inputs the stack takes that reads them."""
        return {name: value for name, value in inputs.items() if not name.startswith(("decoder_", "logits_to_keep"))}

    @torch.no_grad()
    def features(self, inputs: dict[str, Any], *, task: str | None) -> Tensor:
        """Pooled features `[B, hidden]` under a finished task's adapter, or of the base model alone for None.

        The active task stays what it was.
        """
        with self._keeping_task():
            self.set_task(task)
            return self.encode(self._read(inputs))

    def generate(self, *args: Any, task_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's `generate` under the active task, or under one finished task a sample.

        The prefix is in no cache and, with `placement="prefix"`, takes no positions.

        Args:
            *args, **kwargs: as the base model takes them.
            task_names: one finished task a sample.

        Raises:
            ValueError: the base model cannot generate, or `task_names` does not fit.
        """
        if not self.base_model.can_generate():
            raise ValueError(f"{type(self.base_model).__name__} has no language modelling head and cannot generate")
        generate: Callable[..., Any] = self.base_model.generate  # type: ignore[assignment]
        with torch.no_grad(), self.evaluating():
            if task_names is None:
                if self._active is not None:
                    self.attention.check_switched()
                    self._place()
                return generate(*args, **kwargs)
            batch = len(args[0]) if args else batch_size(kwargs)
            with self.using(task_names, batch):
                return generate(*args, **kwargs)

    def _prefix(self, name: str, live: bool) -> Prefix:
        """What stands on the attention layers under a task; what `live` means, a model that learns knows."""
        return self.adapters[name].prefix(self.device, num_layers=len(self.layer_indices))

    def _place(self) -> None:
        """Put the active task's prefix on the attention layers."""
        assert self._active is not None
        with self._undone_by_errors():
            self.attention.place(self.layer_indices, self._prefix(*self._active))

    @contextmanager
    def _keeping_task(self) -> Iterator[None]:
        """After the block the active task is what it was before."""
        active = self._active
        try:
            with self.attention.keeping():
                yield
        finally:
            self._active = active

    @contextmanager
    def _undone_by_errors(self) -> Iterator[None]:
        """An error in the block leaves the task that was set before, and its prefix in place."""
        active, placed = self._active, self.attention.placed
        try:
            yield
        except BaseException:
            self._active = active
            self.attention.put_back(placed)
            raise

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # to(), cuda(), half(): what stands on the attention layers moves along, and slots are made anew.
        self.bank.clear()
        super()._apply(*args, **kwargs)
        if self._active is not None:
            self._place()
        return self

    # Checks

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


_COUNTED = ("input_ids", "inputs", "inputs_embeds", "pixel_values", "decoder_input_ids", "decoder_inputs_embeds")


def batch_size(inputs: dict[str, Any]) -> int:
    """How many samples the inputs of a forward pass, by name, are of; a ValueError where nothing tells."""
    for name in _COUNTED:
        if isinstance(inputs.get(name), Tensor):
            return len(inputs[name])
    raise ValueError(f"the inputs hold none of {', '.join(_COUNTED)}, by which the samples of a batch are counted")
