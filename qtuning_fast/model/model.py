"""QTuningModel: a transformers model that learns one task after another through a bounded queue of prompts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtuning_fast.method.adapter import TaskAdapter, checked_labels
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.method.prompts import Prefix
from qtuning_fast.method.retention import Discriminator, retention_loss
from qtuning_fast.model.checked_files import CorruptFileError
from qtuning_fast.model.checkpoint import SavedModel, read_saved, write_saved
from qtuning_fast.model.distributed import agree
from qtuning_fast.model.fingerprint import fingerprint
from qtuning_fast.model.finished import FinishedTasksModel, QTuningOutput, batch_size
from qtuning_fast.model.training_prefix import LivePrefix

_BASE = "base_model."
_QUEUE = "queue."


class QTuningModel(FinishedTasksModel):
    """Attaches Q-tuning's prompt queue and NoRGa's gate to a frozen transformers model.

    Tasks come one after another: `start_task`, train, `finish_task`. Each finished task stays available as a small
    adapter (`set_task`). With no task set, the base model computes what it always did, by its own functions.

    For classification each task has a head on pooled features (`encode`), scaled to unit root mean square; of a base
    model with a head of its own only what is below it is used. For language modelling the base model's head is used,
    and `forward` returns what the base model returns. The backbone is frozen and stays in eval mode. The prefix stands
    on the attention layers while a model computes: one model serves one thread at a time, and models that share a
    config switch together.

    Args:
        base_model: a transformers model whose layers call the attention interface (docs/models.md), or peft's wrapper
            around one.
        config: see `QTuningConfig`.

    Raises:
        TypeError, ValueError: an argument is not what it must be, or the config does not fit the model.
        NotImplementedError: the model's attention cannot take a prefix; the message says why.
    """

    discriminator: Discriminator | None
    head: nn.Linear | None

    def __init__(self, base_model: PreTrainedModel, config: QTuningConfig) -> None:
        super().__init__(base_model, config)
        shapes = [self.attention.layers[index].shape for index in self.layer_indices]
        size = self.embedding_size
        try:
            self.live = LivePrefix(shapes, config, vocabulary=self.vocabulary, embedding_size=size).to(self.device)
        except ValueError:
            self.detach()
            raise
        # Registered now, so that parameters come in one order however a model came to be: sums over them (gradient
        # clipping) would otherwise differ in the last bits between a run and the same run resumed.
        self.register_module("discriminator", None)
        self.register_module("head", None)
        self._training_task: tuple[str, tuple[str, ...]] | None = None
        self._last_learned: str | None = None

    # Tasks

    @property
    def retains_memory(self) -> bool:
        """Whether the loss of the task in training holds the memory retention term: from the first eviction on."""
        return self.live.queue.evictions > 0 and self._may_retain

    @property
    def _may_retain(self) -> bool:
        config = self.qtuning_config
        reads = any(
            self.attention.layers[index].stack == self.attention.layers[0].stack for index in self.layer_indices
        )
        return config.retention_weight > 0 and config.shared_length > 0 and reads  # features are of what was read

    def start_task(self, name: str, num_labels: int | None = None, *, label_names: Sequence[str] | None = None) -> None:
        """Make room in the queue and begin a new prompt and head; the model then computes under the new task.

        Args:
            name: a new task's name.
            num_labels: classes, at least two; may be left out where `label_names` is given. Language modelling tasks
                need neither.
            label_names: one a class.

        Raises:
            TypeError, ValueError: the name is taken or the labels are not usable.
            RuntimeError: another task is in training, or layers of the base model pass no gradient.
        """
        self._check_attached()
        if self._training_task is not None:
            raise RuntimeError(f"task {self._training_task[0]!r} is in training; finish_task comes first")
        labels = checked_labels(name, num_labels, label_names, required=self.has_heads)
        if name in self.adapters:
            raise ValueError(f"name is {name!r}, and a task of that name is finished already")
        with self._keeping_task():
            self._check_gradient(self.layer_indices)
        device = self.device
        self.live.begin_task()
        if self.retains_memory and self.discriminator is None:
            self.discriminator = Discriminator(self.hidden_size)
        if self.discriminator is not None:
            self.discriminator.to(device).requires_grad_(True)
        self.head = nn.Linear(self.hidden_size, len(labels)).to(device) if self.has_heads else None
        self._training_task = name, labels
        agree([parameter for parameter in self.parameters() if parameter.requires_grad])
        self.set_task(name)

    def finish_task(self) -> TaskAdapter:
        """Fold the trained prompt, store the task's adapter and free what only training needed.

        Raises:
            RuntimeError: no task is in training.
        """
        self._check_attached()
        if self._training_task is None:
            raise RuntimeError("no task is in training; call start_task first")
        name, labels = self._training_task
        adapter = self.live.finish_task(name, labels, self.head)
        self.adapters.add(adapter.info, adapter=adapter)
        self._last_learned = name
        self.head = None
        self._training_task = None
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
        self.zero_grad()
        self.set_task(name)
        return adapter

    def set_task(self, name: str | None, *, live: bool = False) -> None:
        """Compute under this task from here on; None for the base model alone, by its own attention.

        Args:
            name: a finished task, the task in training, or None.
            live: run a finished task's head under the live prefix `[P* ; P_new ; W ∘ Q_old]` and the live gate instead
                of the task's own.

        Raises:
            ValueError: no task of this name.
        """
        in_training = name is not None and self._is_training(name)
        if name is not None and not in_training:
            self._check_finished(name)
        self._set(name, live=live or in_training)

    def remove_task(self, name: str) -> None:
        """Forget a finished task; one of the same name may come in its place. Other tasks stay as they are.

        What the queue has of its prompt stays there.

        Raises:
            ValueError: no finished task of this name.
            RuntimeError: it is in training, or set, or the next task's memory retention will need it.
        """
        if self._is_training(name):
            raise RuntimeError(f"task {name!r} is in training; finish_task comes first")
        if name == self.active_task:
            raise RuntimeError(f"task {name!r} is set; set_task, to another or to None, comes first")
        if name == self._last_learned and self._may_retain:
            raise RuntimeError(
                f"task {name!r} was learned last: the next one's memory retention is held against its adapter; with "
                "retention_weight=0 it could go"
            )
        super().remove_task(name)
        if name == self._last_learned:
            self._last_learned = None

    def _check_new(self, adapter: TaskAdapter) -> None:
        super()._check_new(adapter)
        if self._is_training(adapter.name):
            raise ValueError(f"a task {adapter.name!r} is in training; another needs another name")

    # Forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        task_names: Sequence[str] | None = None,
        retention_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits under the active task, or the base model's own output where no task is set.

        Args:
            input_ids: `[B, N]` integers; or instead `inputs_embeds`, `[B, N, E]`, or `pixel_values`.
            attention_mask: `[B, N]`, 1 for tokens and 0 for padding.
            token_type_ids, position_ids, decoder_input_ids, decoder_attention_mask: as the base model takes them.
            labels: `[B]` class indices; for language modelling token ids, as the base model takes them.
            task_names: one finished task a sample; each sample then gets its own task's adapter.
            retention_features: `[B, hidden]`, the features of this batch under the previous task's adapter
                (`features`), where they were computed beforehand; they are computed here otherwise.
            **kwargs: for the base model.

        Returns:
            `QTuningOutput` for classification, else what the base model returns. Its `retention_loss` is set where
            memory retention is due, and part of its `loss`.

        Raises:
            ValueError: attention weights are asked for, or `task_names` does not fit.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        inputs = kwargs | {name: value for name, value in named.items() if value is not None}
        self._check_inputs(inputs, under_a_task=self._active is not None or task_names is not None)
        if task_names is not None:
            with self.using(task_names, batch_size(inputs)) as mixed:
                return self._compute(inputs, labels, mixed)
        if self._active is None:
            return self.base_model(**inputs, **({} if labels is None else {"labels": labels}))
        self._check_attached()
        self.attention.check_switched()
        if labels is not None and self.training and self._is_training(self._active[0]) and self.retains_memory:
            return self._compute_retaining(inputs, labels, retention_features)
        if self._active[1]:
            self._place()  # the live prefix moves with every step
        return self._compute(inputs, labels)

    def _compute_retaining(self, inputs: dict[str, Any], labels: Tensor, retention_features: Tensor | None) -> Any:
        """One step with memory retention: the batch under the live prefix and under the shared prompt alone."""
        if retention_features is None:
            retention_features = self.features(inputs, task=self._last_learned)
        if self.has_heads:
            with self.attention.keeping():
                features, shared_features = self._features_with_shared(inputs)
            logits = self._logits(features)
            output: Any = QTuningOutput(loss=F.cross_entropy(logits.float(), labels), logits=logits)
        else:
            index = torch.ones(batch_size(inputs), dtype=torch.long, device=self.device)
            with self.attention.keeping():
                self.attention.place(self.layer_indices, self.live.prefix_with_shared(index))
                shared_features = self.encode(self._read(inputs))
            self._place()
            output = self._compute(inputs, labels)
        if len(shared_features) > 1:  # a batch of one has no product pairs
            assert self.discriminator is not None
            shift = int(torch.randint(1, len(shared_features), ()))
            old = retention_features.to(shared_features)
            retention = retention_loss(self.discriminator, shared_features, old, shift)
            output["loss"] = output.loss + self.qtuning_config.retention_weight * retention
            output["retention_loss"] = retention
        return output

    def _is_training(self, name: str) -> bool:
        return self._training_task is not None and name == self._training_task[0]

    def _logits(self, features: Tensor) -> Tensor:
        if self.head is None or self._active is None or not self._is_training(self._active[0]):
            return super()._logits(features)
        return self.head(features.to(self.head.weight.dtype))

    def _prefix(self, name: str, live: bool) -> Prefix:
        return self.live.prefix() if live else super()._prefix(name, live)

    def _features_with_shared(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Features under the live prefix, and under the shared prompt alone: one pass of twice the batch."""
        batch = batch_size(inputs)
        index = torch.arange(2, device=self.device).repeat_interleave(batch)
        self.attention.place(self.layer_indices, self.live.prefix_with_shared(index))
        doubled = {name: torch.cat([v, v]) if _has_batch(v, batch) else v for name, v in inputs.items()}
        features, shared_features = self.encode(doubled).chunk(2)
        return features, shared_features

    def __deepcopy__(self, memo: dict[int, Any]) -> QTuningModel:
        # Hooks on the base model, and what stands on its layers, are this model's: the copy gets its own.
        active = self._active
        with self._keeping_task():
            self.set_task(None)
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        if active is not None:
            copied.set_task(active[0], live=active[1])
        return copied

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of the task in training by kind: `prompt`, `gate`, `head` and `network`.

        `prompt` is the prompts and the reweighting; `network` the reparametrisation and the discriminator.
        """
        groups: dict[str, list[nn.Module | None]] = {
            "gate": [*self.live.gates],
            "head": [self.head],
            "network": [self.live.reparameterization, self.discriminator],
        }
        found = {
            kind: [parameter for module in modules if module is not None for parameter in module.parameters()]
            for kind, modules in groups.items()
        }
        others = {id(parameter) for parameters in found.values() for parameter in parameters}
        found["prompt"] = [parameter for parameter in self.live.parameters() if id(parameter) not in others]
        return {kind: [each for each in parameters if each.requires_grad] for kind, parameters in found.items()}

    # State

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The state of everything but the base model: what a checkpoint within a task needs."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(_BASE)}

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `trainable_state_dict` within the same task."""
        # Not through the base model: its layers may insist on finding their own state, as quantised ones do.
        own = nn.ModuleDict({name: module for name, module in self.named_children() if f"{name}." != _BASE})
        missing, unexpected = own.load_state_dict(state, strict=False)
        if missing or unexpected:
            raise ValueError(f"the state does not fit the task in training: missing {missing}, unexpected {unexpected}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the queue and the adapters of all finished tasks into a folder, replacing what was there in one step.

        Raises:
            RuntimeError: a task is in training.
        """
        if self._training_task is not None:
            raise RuntimeError(f"task {self._training_task[0]!r} is in training; finish_task comes first")
        state = self.trainable_state_dict() | {
            f"{_QUEUE}{name}": value for name, value in self.live.queue.state_dict().items()
        }
        kind = type(self.base_model).__name__
        base = fingerprint(self.attention.model)
        write_saved(Path(folder), SavedModel(self.qtuning_config, base, kind, self.adapters, state, self._last_learned))

    @classmethod
    def from_pretrained(cls, base_model: PreTrainedModel, folder: str | Path, *, lazy: bool = False) -> QTuningModel:
        """Attach what `save_pretrained` wrote to the same base model; no task is set.

        Args:
            base_model: as the adapters were made for.
            folder: where they are.
            lazy: read each adapter when it is first needed. The files must be there then; one that is damaged is
                refused then.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: the files are damaged, of an unknown format version, or made for another base model.
        """
        saved = read_saved(Path(folder), lazy=lazy)
        model = cls(base_model, saved.config)
        try:
            model._check_base_model(saved, Path(folder))
            model._restore(saved)
        except (KeyError, RuntimeError) as error:
            model.detach()
            raise CorruptFileError(f"{folder}: what is saved does not fit its own config: {error}") from None
        except ValueError:
            model.detach()
            raise
        return model

    def _restore(self, saved: SavedModel) -> None:
        self._use(saved.adapters)
        self._last_learned = saved.last_learned
        queue = {name: value for name, value in saved.state.items() if name.startswith(_QUEUE)}
        self.live.queue.load_state_dict({name.removeprefix(_QUEUE): value for name, value in queue.items()})
        state = {name: value for name, value in saved.state.items() if name not in queue}
        self.live.begin_prompts(len(state["live._rows.0.prompt"]))
        if any(name.startswith("discriminator.") for name in state):
            self.discriminator = Discriminator(self.hidden_size).to(self.device)
            self.discriminator.requires_grad_(False)
        self.live.requires_grad_(False)
        self.load_trainable_state_dict(state)

    def detach(self) -> PreTrainedModel:
        """Take everything off the base model and give it back as it was; no task can be set from here on."""
        self._active = None
        return super().detach()


def _has_batch(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
