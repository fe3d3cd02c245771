"""QTuningModel: a transformers model that learns one task after another through a bounded queue of prompts."""

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

from qtuning_fast.adapter import TaskAdapter, bank_of, checked_labels
from qtuning_fast.attached import AttachedModel
from qtuning_fast.config import HEAD_TASK_TYPES, QTuningConfig
from qtuning_fast.fingerprint import fingerprint
from qtuning_fast.integrations.transformers import AttentionLayer
from qtuning_fast.live import LivePrefix
from qtuning_fast.nn import Discriminator, Prefix, retention_loss
from qtuning_fast.nn.distributed import agree
from qtuning_fast.pretrained import SavedModel, read_saved, write_saved
from qtuning_fast.storage import CorruptFileError

_BASE = "base_model."
_QUEUE = "queue."


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


class QTuningModel(AttachedModel):
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
    # The task that is set: its name, and whether it runs under the live prefix.
    _active: tuple[str, bool] | None = None

    def __init__(self, base_model: PreTrainedModel, config: QTuningConfig) -> None:
        if not isinstance(config, QTuningConfig):
            raise TypeError(f"config is a {type(config).__name__}; it must be a QTuningConfig")
        super().__init__(base_model, config.placement)
        try:
            _check_task_type(config.task_type, self.base_model, causal=self.attention.is_causal)
            self.layer_indices = _chosen_layers(config, self.attention.layers)
            shapes = [self.attention.layers[index].shape for index in self.layer_indices]
            words = self.encoder.get_input_embeddings()
            vocabulary = words if isinstance(words, nn.Embedding) else None
            size = self.hidden_size if vocabulary is None else vocabulary.embedding_dim
            self.live = LivePrefix(shapes, config, vocabulary=vocabulary, embedding_size=size).to(self.device)
        except (ValueError, NotImplementedError):
            self.detach()
            raise
        self.qtuning_config = config
        # Registered now, so that parameters come in one order however a model came to be: sums over them (gradient
        # clipping) would otherwise differ in the last bits between a run and the same run resumed.
        self.register_module("discriminator", None)
        self.register_module("head", None)
        self.adapters: dict[str, TaskAdapter] = {}
        self._training_task: tuple[str, tuple[str, ...]] | None = None

    # Tasks

    @property
    def tasks(self) -> list[str]:
        """Names of the finished tasks, in order."""
        return list(self.adapters)

    @property
    def has_heads(self) -> bool:
        """Whether each task has a head of its own; otherwise the base model's language modelling head is used."""
        return self.qtuning_config.task_type in HEAD_TASK_TYPES

    @property
    def retains_memory(self) -> bool:
        """Whether the loss of the task in training holds the memory retention term: from the first eviction on."""
        config = self.qtuning_config
        return self.live.queue.evictions > 0 and config.retention_weight > 0 and config.shared_length > 0

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
        self.check_attached()
        if self._training_task is not None:
            raise RuntimeError(f"task {self._training_task[0]!r} is in training; finish_task comes first")
        labels = checked_labels(name, num_labels, label_names, required=self.has_heads)
        if name in self.adapters:
            raise ValueError(f"name is {name!r}, and a task of that name is finished already")
        with self._keeping_task():
            self.check_gradient(self.layer_indices)
        device = self.device
        self.live.begin_task(first=not self.tasks)
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
        self.check_attached()
        if self._training_task is None:
            raise RuntimeError("no task is in training; call start_task first")
        name, labels = self._training_task
        adapter = self.live.finish_task(name, labels, self.head)
        self.adapters[name] = adapter
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
        if name is None:
            self._active = None
            self.attention.restore()
            return
        self.check_attached()
        in_training = self._is_training(name)
        if not in_training:
            self._adapter(name)
        self._active = name, live or in_training
        self.attention.switch()
        self._place()

    def label_names(self, name: str) -> tuple[str, ...]:
        """The classes of a finished task."""
        return self._adapter(name).label_names

    def _adapter(self, name: str) -> TaskAdapter:
        if name not in self.adapters:
            raise ValueError(f"task {name!r} is not among the finished tasks: {', '.join(self.tasks) or 'none yet'}")
        return self.adapters[name]

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
            with self.using(task_names, _batch_size(inputs)):
                return self._compute(inputs, labels, task_names)
        if self._active is None:
            return self.base_model(**inputs, **({} if labels is None else {"labels": labels}))
        self.check_attached()
        if labels is not None and self.training and self._is_training(self._active[0]) and self.retains_memory:
            return self._compute_retaining(inputs, labels, retention_features)
        if self._active[1]:
            self._place()  # the live prefix moves with every step
        return self._compute(inputs, labels)

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

    def _compute(self, inputs: dict[str, Any], labels: Tensor | None, task_names: Sequence[str] | None = None) -> Any:
        """Loss and logits under what stands on the attention layers."""
        if not self.has_heads:
            # A checkpoint computes layers twice, which would write twice into a cache.
            cache = {"use_cache": False} if self.attention.checkpoints else {}
            return self.base_model(**(cache | inputs), **({} if labels is None else {"labels": labels}))
        features = self.encode(inputs)
        logits = self._logits(features) if task_names is None else self._logits_mixed(features, task_names, labels)
        return QTuningOutput(loss=None if labels is None else F.cross_entropy(logits.float(), labels), logits=logits)

    def _compute_retaining(self, inputs: dict[str, Any], labels: Tensor, retention_features: Tensor | None) -> Any:
        """One step with memory retention: the batch under the live prefix and under the shared prompt alone."""
        if retention_features is None:
            retention_features = self.features(inputs, task=self.tasks[-1])
        if self.has_heads:
            features, shared_features = self._features_with_shared(inputs)
            logits = self._logits(features)
            output: Any = QTuningOutput(loss=F.cross_entropy(logits.float(), labels), logits=logits)
        else:
            index = torch.ones(_batch_size(inputs), dtype=torch.long, device=self.device)
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

    @torch.no_grad()
    def features(self, inputs: dict[str, Any], *, task: str | None) -> Tensor:
        """Pooled features `[B, hidden]` under a finished task's adapter, or of the base model alone for None.

        The active task stays what it was.
        """
        with self._keeping_task():
            self.set_task(task)
            return self.encode(self._read(inputs))

    def _read(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What of the inputs the stack takes that reads them."""
        return {name: value for name, value in inputs.items() if not name.startswith(("decoder_", "logits_to_keep"))}

    @contextmanager
    def _keeping_task(self) -> Iterator[None]:
        """After the block the active task is what it was before."""
        active = self._active
        try:
            yield
        finally:
            if active is None:
                self.set_task(None)
            else:
                self.set_task(active[0], live=active[1])

    @contextmanager
    def using(self, task_names: Sequence[str], batch: int) -> Iterator[None]:
        """Within the block each sample of a batch of this size computes under its own finished task.

        Raises:
            ValueError: a task is unknown, or there is not one name a sample.
        """
        self.check_attached()
        if isinstance(task_names, str) or len(task_names) != batch:
            raise ValueError(f"task_names is {task_names!r}; it must hold one name for each of the {batch} samples")
        names = list(dict.fromkeys(task_names))
        adapters = [self._adapter(name) for name in names]
        index = torch.tensor([names.index(name) for name in task_names], device=self.device)
        prefix = bank_of(adapters, index, num_layers=len(self.layer_indices))
        with self._keeping_task():
            self.attention.switch()
            self.attention.place(self.layer_indices, prefix)
            yield

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
        was_training = self.training
        self.eval()  # layers that checkpoint would not use the cache
        try:
            if task_names is None:
                if self._active is not None:
                    self._place()
                return generate(*args, **kwargs)
            batch = len(args[0]) if args else _batch_size(kwargs)
            with torch.no_grad(), self.using(task_names, batch):
                return generate(*args, **kwargs)
        finally:
            self.train(was_training)

    def _is_training(self, name: str) -> bool:
        return self._training_task is not None and name == self._training_task[0]

    def _logits(self, features: Tensor) -> Tensor:
        assert self._active is not None
        name = self._active[0]
        if self._is_training(name):
            assert self.head is not None
            return self.head(features.to(self.head.weight.dtype))
        return self.adapters[name].logits(features)

    def _logits_mixed(self, features: Tensor, task_names: Sequence[str], labels: Tensor | None) -> Tensor:
        """`[B, most classes]`, each sample by its own task's head, −inf beyond its classes."""
        counts = [len(self.label_names(name)) for name in task_names]
        logits = features.new_full((len(features), max(counts)), float("-inf"))
        for name in dict.fromkeys(task_names):
            rows = torch.tensor([each == name for each in task_names], device=features.device)
            logits[rows, : len(self.label_names(name))] = self.adapters[name].logits(features[rows]).to(logits.dtype)
        classes = torch.tensor(counts)
        if labels is not None and labels.device.type == "cpu" and (labels >= classes).any():
            raise ValueError(f"labels is {labels.tolist()}, but the samples' tasks have {counts} classes")
        return logits

    def _place(self) -> None:
        """Put the active task's prefix on the attention layers."""
        assert self._active is not None
        self.attention.place(self.layer_indices, self._prefix(*self._active))

    def _prefix(self, name: str, live: bool) -> Prefix:
        if live:
            return self.live.prefix()
        return self.adapters[name].prefix(self.device, num_layers=len(self.layer_indices))

    def _features_with_shared(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Features under the live prefix, and under the shared prompt alone: one pass of twice the batch."""
        batch = _batch_size(inputs)
        index = torch.arange(2, device=self.device).repeat_interleave(batch)
        self.attention.place(self.layer_indices, self.live.prefix_with_shared(index))
        doubled = {name: torch.cat([v, v]) if _has_batch(v, batch) else v for name, v in inputs.items()}
        features, shared_features = self.encode(doubled).chunk(2)
        return features, shared_features

    def _apply(self, *args: Any, **kwargs: Any) -> QTuningModel:
        # to(), cuda(), half(): what stands on the attention layers moves along.
        super()._apply(*args, **kwargs)
        if self._active is not None:
            self._place()
        return self

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
        adapters = tuple(self.adapters.values())
        kind = type(self.base_model).__name__
        write_saved(
            Path(folder), SavedModel(self.qtuning_config, fingerprint(self.attention.model), kind, adapters, state)
        )

    @classmethod
    def from_pretrained(cls, base_model: PreTrainedModel, folder: str | Path) -> QTuningModel:
        """Attach what `save_pretrained` wrote to the same base model; no task is set.

        Raises:
            FileNotFoundError: nothing was saved there.
            ValueError: the files are damaged, of an unknown format version, or made for another base model.
        """
        saved = read_saved(Path(folder))
        model = cls(base_model, saved.config)
        try:
            if fingerprint(model.attention.model) != saved.fingerprint:
                raise ValueError(
                    f"{folder} was made for another base model: a {saved.base_model} with the fingerprint "
                    f"{saved.fingerprint[:12]}, not this {type(base_model).__name__} in {base_model.dtype}"
                    + (" (load it in float32 or bfloat16)" if base_model.dtype == torch.float16 else "")
                )
            model._restore(saved)
        except (KeyError, RuntimeError) as error:
            model.detach()
            raise CorruptFileError(f"{folder}: what is saved does not fit its own config: {error}") from None
        except ValueError:
            model.detach()
            raise
        return model

    def _restore(self, saved: SavedModel) -> None:
        self.adapters = {adapter.name: adapter for adapter in saved.adapters}
        queue = {name: value for name, value in saved.state.items() if name.startswith(_QUEUE)}
        self.live.queue.load_state_dict({name.removeprefix(_QUEUE): value for name, value in queue.items()})
        state = {name: value for name, value in saved.state.items() if name not in queue}
        self.live.begin_prompts(self.qtuning_config.prompt_length if saved.adapters else 0)
        if any(name.startswith("discriminator.") for name in state):
            self.discriminator = Discriminator(self.hidden_size).to(self.device)
            self.discriminator.requires_grad_(False)
        self.live.requires_grad_(False)
        self.load_trainable_state_dict(state)

    def detach(self) -> PreTrainedModel:
        """Take everything off the base model and give it back as it was; no task can be set from here on."""
        self._active = None
        return super().detach()


def _chosen_layers(config: QTuningConfig, layers: Sequence[AttentionLayer]) -> list[int]:
    """Indices of the layers that get a prefix."""
    stacks = {layer.stack for layer in layers}
    there = [i for i, layer in enumerate(layers) if len(stacks) == 1 or config.stack in (layer.stack, "both")]
    if config.layers is None:
        return there
    if max(config.layers) >= len(there):
        raise ValueError(f"layers names layer {max(config.layers)}, but the model has layers 0 to {len(there) - 1}")
    return [there[index] for index in sorted(config.layers)]


def _check_task_type(task_type: str, base_model: PreTrainedModel, *, causal: bool) -> None:
    """Raise a ValueError where the model is not of the kind that the task type needs."""
    reads = "images" if base_model.main_input_name == "pixel_values" else "text"
    two_stacks, writes = base_model.config.is_encoder_decoder, base_model.can_generate()
    needs = {
        "sequence-classification": ("a model that reads text", reads == "text"),
        "image-classification": ("a model that reads images", reads == "images"),
        "text-to-text": ("an encoder-decoder with a language modelling head", two_stacks and writes),
        "causal-lm": ("a decoder with a language modelling head", causal and not two_stacks and writes),
    }
    needed, fits = needs[task_type]
    if not fits:
        raise ValueError(f"task_type={task_type!r} needs {needed}, which a {type(base_model).__name__} is not")


def _has_batch(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch


def _batch_size(inputs: dict[str, Any]) -> int:
    return next(len(value) for value in inputs.values() if isinstance(value, Tensor))
