"""QTuningModel: a transformers model that learns one task after another through a bounded queue of prompts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from qtuning_fast.method.adapter import RANDOM, TaskAdapter, check_not_reserved, checked_labels
from qtuning_fast.method.config import HEAD_TASK_TYPES, QTuningConfig
from qtuning_fast.method.labels import SINGLE
from qtuning_fast.method.prefix import Prefix
from qtuning_fast.method.retention import Discriminator, RetentionPairs
from qtuning_fast.method.statistics import TaskStatistics
from qtuning_fast.method.task_inference import FALSE_ALARM_RATE, FittedRule, TaskInference
from qtuning_fast.method.task_rule import TaskRule
from qtuning_fast.method.task_rules import rule_by_name
from qtuning_fast.model.active_task import ActiveTask
from qtuning_fast.model.backbone import Backbone
from qtuning_fast.model.checkpoint import from_version_3, rename_version_3, write_checkpoint
from qtuning_fast.model.chosen_tasks import SetTask
from qtuning_fast.model.compatibility import check_task_type, chosen_layers
from qtuning_fast.model.computing import Computing
from qtuning_fast.model.device_slots import AdapterSlots, MixedBatch
from qtuning_fast.model.distributed import synchronize
from qtuning_fast.model.hub import PushOptions, push_checkpoint
from qtuning_fast.model.hub_files import DownloadOptions, located
from qtuning_fast.model.inferring import check_inputs, infer, inferred
from qtuning_fast.model.known_tasks import Batch
from qtuning_fast.model.learning import Learning
from qtuning_fast.model.model_card import model_card
from qtuning_fast.model.output import batch_size
from qtuning_fast.model.pretrained import PretrainedInterface, config_of_task
from qtuning_fast.model.registry import AdapterRegistry, StatisticsRegistry
from qtuning_fast.model.saving import checkpoint_of, restored
from qtuning_fast.model.starting import ChosenStart, Donors, StartExamples, check_start, choose_start
from qtuning_fast.model.tasks import Tasks
from qtuning_fast.model.training_prefix import TrainingPrefix


class QTuningModel(PretrainedInterface):
    """Attaches Q-tuning's prompt queue and NoRGa's gate to a frozen transformers model.

    Tasks come one after another: `start_task`, train, `finish_task`. Each finished task stays available as a small
    adapter (`set_task`). With no task set, the base model computes its original output with its own functions.

    For classification each task has a head on pooled features (`encode`), scaled to unit root mean square; a head of
    the base model is not used. For language modelling the base model's head is used, and `forward` returns what the
    base model returns. The backbone is frozen and stays in eval mode.

    Several threads and asyncio tasks may use one model, each under its own task: `set_task` sets it for the thread or
    asyncio task that calls it. One that has set none computes under the task of the others, if they agree. While a
    model computes, the prefix is on the attention layers, so it computes one call at a time, and so do models that
    share a config.

    Args:
        base_model: a transformers model whose layers call the attention interface (docs/models.md), or peft's wrapper
            around one.
        config: see `QTuningConfig`.

    Attributes:
        base_model: the transformers model, without peft's wrapper.
        backbone: the frozen base model, with the injector of prefixes.
        learning: the trainable parts: the training prefix, the head and the discriminator.

    Raises:
        TypeError, ValueError: an argument is invalid, or the config does not fit the model.
        NotImplementedError: the model's attention cannot take a prefix; the message says why.
    """

    def __init__(self, base_model: PreTrainedModel, config: QTuningConfig) -> None:
        if not isinstance(config, QTuningConfig):
            raise TypeError(f"config is a {type(config).__name__}; it must be a QTuningConfig")
        super().__init__()
        self.qtuning_config = config
        self.backbone = backbone = Backbone(base_model, config.placement)
        self.base_model = backbone.model
        try:
            check_task_type(config.task_type, self.base_model, causal=backbone.injector.is_causal)
            self.layer_indices = chosen_layers(config, backbone.injector.layers)
            shapes = [backbone.injector.layers[index].shape for index in self.layer_indices]
            prefix = TrainingPrefix(
                shapes, config, vocabulary=backbone.vocabulary, embedding_size=backbone.embedding_size
            ).to(self.device)
        except ValueError:
            backbone.detach()
            raise
        self.learning = Learning(prefix, hidden_size=backbone.hidden_size, has_heads=self.has_heads)
        self._tasks = Tasks(backbone, self.layer_indices, config)
        self.register_load_state_dict_pre_hook(rename_version_3)
        prefix_of = partial(_prefix_of, self.learning, backbone, len(self.layer_indices))
        self._active = ActiveTask(backbone.injector, self.layer_indices, prefix_of)
        self._computing = Computing(backbone, self.learning, self._active, self.layer_indices, config)
        self._mixed: MixedBatch | None = None  # of the block `using` that is open
        self.name_inputs(self._reads_inputs)

    # Parts

    @property
    def adapters(self) -> AdapterRegistry:
        """The adapters of the finished tasks by name."""
        return self._tasks.adapters

    @property
    def statistics(self) -> StatisticsRegistry:
        """What was recorded of the finished tasks' examples, by task name; see `record_statistics`."""
        return self._tasks.known.statistics

    @property
    def task_rule(self) -> TaskRule:
        """The rule by which the task of an input is inferred; set it to one, or to a name in `RULES`.

        Setting it fits it anew, also after a change of its settings. A rule in `RULES` is saved with the model; for
        another, loading warns.
        """
        return self._tasks.known.rule

    @task_rule.setter
    def task_rule(self, rule: TaskRule | str) -> None:
        self._tasks.known.rule = rule_by_name(rule)

    @property
    def slots(self) -> AdapterSlots:
        """The slots on the device for adapters that batches of several tasks use."""
        return self._tasks.slots

    @property
    def training_prefix(self) -> TrainingPrefix:
        """The training prefix `[P* ; P_new ; W ∘ Q_old]` with its gates and the queue."""
        return self.learning.prefix

    @property
    def live(self) -> TrainingPrefix:
        """`training_prefix`, by its name in version 0.1.0."""
        return self.training_prefix

    @property
    def bank(self) -> AdapterSlots:
        """`slots`, by its name in version 0.1.0."""
        return self.slots

    @property
    def head(self) -> nn.Linear | None:
        """The head of the task in training."""
        return self.learning.head

    @property
    def discriminator(self) -> Discriminator | None:
        """The discriminator of memory retention; None before the first eviction."""
        return self.learning.discriminator

    @property
    def tasks(self) -> list[str]:
        """The names of the finished tasks, in order."""
        return list(self.adapters)

    @property
    def active_task(self) -> str | None:
        """The task that is set in this thread or asyncio task.

        Raises:
            RuntimeError: it has set none, and others have set different ones.
        """
        return self._active.name

    @property
    def has_heads(self) -> bool:
        """Whether each task has a head of its own; otherwise the base model's language modelling head is used."""
        return self.qtuning_config.task_type in HEAD_TASK_TYPES

    @property
    def retains_memory(self) -> bool:
        """Whether the loss of the task in training has the memory retention term: from the first eviction on."""
        return self.training_prefix.queue.evictions > 0 and self._may_retain

    @property
    def _may_retain(self) -> bool:
        config, layers = self.qtuning_config, self.backbone.injector.layers
        reads = any(layers[index].stack == layers[0].stack for index in self.layer_indices)  # features are the input's
        evicts = config.eviction is not None and config.prompt_length > 0
        return config.retention_weight > 0 and config.shared_length > 0 and evicts and reads

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.backbone.device

    @property
    def hidden_size(self) -> int:
        """The length of a feature vector."""
        return self.backbone.hidden_size

    def label_names(self, name: str) -> tuple[str, ...]:
        """Return the classes of a finished task."""
        return self._tasks.label_names(name)

    def problem_type(self, name: str) -> str:
        """Return what labels of a finished task mean; see `start_task`."""
        return self._tasks.problem_type(name)

    @property
    def config(self) -> PreTrainedConfig:
        """The base model's config; for a task with a head a copy of it with the task's classes."""
        base, task = self.base_model.config, self.active_task
        if not self.has_heads or task is None:
            return base
        if task == self.learning.task:
            names, problem_type = self.learning.label_names, self.learning.problem_type
        else:
            names, problem_type = self.label_names(task), self.problem_type(task)
        config = self._computing.task_configs.get(task)
        if config is None or (config.id2label, config.problem_type) != (dict(enumerate(names)), problem_type):
            config = self._computing.task_configs[task] = config_of_task(config or base, names, problem_type)
        return config

    # Tasks

    def start_task(
        self,
        name: str,
        num_labels: int | None = None,
        *,
        label_names: Sequence[str] | None = None,
        problem_type: str = SINGLE,
        start_from: str = RANDOM,
        examples: Iterable[Batch] | None = None,
        validation: Iterable[Batch] | None = None,
    ) -> ChosenStart:
        """Make room in the queue and start a new prompt and head; the model then computes under the new task.

        With examples, the head starts in closed form, the Gaussian classifier of their features, instead of at random.
        The examples pass through the model six times at most, however many tasks there are; 256 are enough. An error
        in the first pass leaves the model as it was. After an error in a later one, out of memory for instance, the
        task has started, at random.

        Args:
            name: name of the new task.
            num_labels: number of classes, at least two; optional with `label_names`. Language modelling tasks need
                neither. With `problem_type="regression"`, the number of outputs, 1 if not given.
            label_names: one name a class, or an output.
            problem_type: what labels of the task's head mean, in the words of transformers:
                `"single_label_classification"`, `"multi_label_classification"` or `"regression"`.
            start_from: where the prompt starts: `"random"`, `"previous"` (the prompt of the task learned last, if there
                is one), a finished task, or `"validation"`: random rows, unless the mean of the queue or the prompt of
                one of the three tasks most like the new one has a loss on the examples that is less by more than one
                standard error. Finished tasks with the same class names give their heads, too, mixed with the closed
                form, where that has as clear a gain; not with `"random"`.
            examples: batches of training examples by name, with `labels`; in a distributed run those of the process. A
                class without an example starts below all others.
            validation: further batches, by which starts are judged, but not made.

        Returns:
            Where the task starts, and what else was considered.

        Raises:
            TypeError, ValueError: the name is taken, the labels or the problem type are invalid, there is nothing to
                start from, or a batch does not fit the task.
            RuntimeError: another task is in training, or layers of the base model pass no gradient.
        """
        self._check_attached()
        labels = checked_labels(name, num_labels, label_names, required=self.has_heads, problem_type=problem_type)
        if problem_type != SINGLE and not self.has_heads:
            task_type = self.qtuning_config.task_type
            raise ValueError(
                f"problem_type is {problem_type!r}, but task_type={task_type!r} has no heads; leave it out"
            )
        with self.backbone.injector.lock:
            self.learning.check_idle()
            if name in self.adapters:
                raise ValueError(f"name is {name!r}, but a finished task has that name; choose another")
            if validation is not None and examples is None:
                raise ValueError("validation judges starts that are made from examples; give examples, too")
            check_start(self._tasks, start_from, has_examples=examples is not None)
            with self._active.kept():
                try:
                    self.backbone.check_gradient(self.layer_indices)
                finally:
                    self.train(self.training)
            given = None
            if examples is not None:
                given = StartExamples(self, name, labels, problem_type, examples, validation or ())
            donors = Donors.of(self, self._tasks, start_from, labels, problem_type, given)
            self.learning.start(name, labels, self.device, retains=self._may_retain, problem_type=problem_type)
            synchronize([parameter for parameter in self.parameters() if parameter.requires_grad])
            self.set_task(name)
            return choose_start(self, start_from, donors, given)

    def finish_task(self) -> TaskAdapter:
        """Fold the trained prompt, store the task's adapter and free what only training needed.

        Raises:
            RuntimeError: no task is in training.
            ValueError: training has diverged; the task is still in training.
        """
        self._check_attached()
        with self.backbone.injector.lock:
            adapter = self.learning.finish()
            self.adapters.add(adapter.info, value=adapter)
            self.zero_grad()
            self.set_task(adapter.name)
            self._active.set_for_all(adapter.name)
        return adapter

    def set_task(self, name: str | None, *, live: bool = False) -> None:
        """Make a task active; None activates the base model alone, with its own attention.

        It is set for the calling thread or asyncio task, and for those that have set none.

        Args:
            name: a finished task, the task in training, or None.
            live: run a finished task's head under the training prefix `[P* ; P_new ; W ∘ Q_old]` and its gate instead
                of the task's own.

        Raises:
            ValueError: no task of this name.
        """
        with self.backbone.injector.lock:
            in_training = name is not None and name == self.learning.task
            adapter = None if name is None or in_training else self._tasks.on_device(name)
            if name is not None:
                self._check_attached()
            self._active.set(name, live=live or in_training, adapter=adapter)

    def add_task(self, adapter: TaskAdapter, statistics: TaskStatistics | None = None) -> None:
        """Add an adapter that was made elsewhere for this base model, as a finished task.

        Queue and training prefix are unchanged.

        Args:
            adapter: the adapter.
            statistics: those of its examples, without which its inputs are not recognised.

        Raises:
            TypeError, ValueError: the adapter or the statistics do not fit this model, or the name is taken.
        """
        with self.backbone.injector.lock:
            self._check_new(adapter)
            self._tasks.add(adapter, statistics)

    def load_task(self, folder: str | Path, name: str, **options: Unpack[DownloadOptions]) -> None:
        """Add one adapter from a checkpoint of the same base model, as a finished task, with its statistics.

        Args:
            folder: a folder, or the name of a repository on the hub, of which nothing else is downloaded.
            name: the task.
            **options: as in `from_pretrained`.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint lacks the task, a file is damaged, the base model or the place of prefixes
                differs, or the name is taken.
            HubError: the hub does not answer, or does not show the repository.
        """
        self.load_tasks(folder, [name], **options)

    def load_tasks(
        self, folder: str | Path, names: Sequence[str], *, lazy: bool = False, **options: Unpack[DownloadOptions]
    ) -> None:
        """Add adapters from a checkpoint of the same base model, as finished tasks, with their statistics: all or none.

        Args:
            folder: a folder, or the name of a repository on the hub, of which nothing else is downloaded.
            names: tasks of it.
            lazy: read each adapter when it is first needed; its file must exist then, and damage is detected then.
            **options: as in `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError, HubError: as in `load_task`.
        """
        saved = self._tasks.read(located(folder, **options), names)
        adapters = {} if lazy else {name: saved.adapters[name] for name in names}
        with self.backbone.injector.lock:
            for name in names:
                self._check_new_name(name)
                if name in adapters:
                    self._tasks.check_new(adapters[name])
            for name in names:
                self._tasks.add_read(name, saved, adapters.get(name))

    def read_task(self, folder: str | Path, name: str) -> tuple[TaskAdapter, TaskStatistics | None]:
        """Read what `load_task` would add, with all its checks except that the name is free, and add nothing.

        Raises:
            FileNotFoundError, TypeError, ValueError: as in `load_task`.
        """
        saved = self._tasks.read(located(Path(folder)), [name])
        adapter, statistics = saved.adapters[name], saved.statistics.get(name)
        self._tasks.check_fits(adapter)
        if statistics is not None:
            self._tasks.known.check(adapter.info, statistics)
        return adapter, statistics

    def remove_task(self, name: str) -> None:
        """Remove a finished task and its statistics, which frees its name. Other tasks are unchanged.

        The queue keeps the rows of its prompt. Inference of tasks is then what it would be without the task.

        Raises:
            ValueError: no finished task has this name.
            RuntimeError: the task is in training or set, or the next task's memory retention will need it.
        """
        with self.backbone.injector.lock:
            if name == self.learning.task:
                self.learning.check_idle()
            if self._active.is_set_anywhere(name):
                raise RuntimeError(f"task {name!r} is set; set another task, or None, first")
            if name == self.learning.last_learned and self._may_retain:
                raise RuntimeError(
                    f"task {name!r} was learned last: memory retention of the next task needs its adapter; only with "
                    "retention_weight=0 can it be removed"
                )
            self._tasks.remove(name)
            if name == self.learning.last_learned:
                self.learning.last_learned = None

    def set_memory_limits(self, *, device_bytes: int | None = None, host_bytes: int | None = None) -> None:
        """Bound the memory that adapters use; None means no bound.

        Args:
            device_bytes: bound on the slots for batches of several tasks, on the model's device. A batch that names
                more tasks than fit is refused.
            host_bytes: bound on the adapters in the host's memory. The least recently used ones that are on disk are
                dropped and read again when needed; adapters that were never saved stay, even beyond the bound. Under a
                bound, statistics that are on disk are read only when tasks come or go.

        Raises:
            TypeError, ValueError: a bound is not a positive integer.
        """
        with self.backbone.injector.lock:
            self._tasks.set_memory_limits(device_bytes=device_bytes, host_bytes=host_bytes)

    # Inferring the task

    def record_statistics(self, name: str, batches: Iterable[Batch], *, validation: Iterable[Batch] = ()) -> None:
        """Record what tells inputs of a finished task from those of other tasks, in one pass of the base model.

        Kept are, per class, the count and the mean of the features and, per task, their scatter
        (`qtuning_fast.method.statistics`). What was recorded before is replaced. In a distributed run every process
        gives its share of the batches; the result is the same in all.

        Args:
            name: a finished task.
            batches: inputs of training examples by name, with `labels`, `[B]` class indices; -100 leaves out a sample.
                A task whose answers are not one class of several (free text, several labels, numbers) needs no labels.
            validation: further batches, of which up to 64 feature vectors are kept. On them the probabilities of
                `infer_tasks` are calibrated, and by them an input of no known task is recognised.

        Raises:
            TypeError, ValueError: there is no such task, no example, or a batch does not fit the task.
        """
        self._tasks.check(name)
        self._tasks.known.record(name, batches, validation, partial(self.features, task=None))

    def add_statistics(self, name: str, statistics: TaskStatistics) -> None:
        """Set the statistics of a finished task that were recorded elsewhere, for this base model.

        Raises:
            TypeError, ValueError: there is no such task, or they do not fit it or the base model.
        """
        with self.backbone.injector.lock:
            self._tasks.check(name)
            self._tasks.known.add(name, statistics)

    def fit_task_rule(self, tasks: Sequence[str] | None = None, rule: TaskRule | str | None = None) -> FittedRule:
        """Return a rule that is fitted to some of the tasks, as if there were no others, and calibrated.

        Args:
            tasks: finished tasks; None: all.
            rule: a rule; None: `task_rule`.

        Raises:
            TypeError, ValueError: an argument is invalid, or no task can be inferred.
        """
        with self.backbone.injector.lock:
            if tasks is None and rule is None:
                return self._tasks.known.fitted()
            names = self.tasks if tasks is None else list(dict.fromkeys(tasks))
            for name in names:
                self._tasks.check(name)
            return self._tasks.known.fit(names, self.task_rule if rule is None else rule_by_name(rule))

    def lacking_statistics(self, rule: TaskRule | str | None = None) -> list[str]:
        """Return the finished tasks that a rule cannot choose, because they have not the statistics that it needs.

        Args:
            rule: a rule; None: `task_rule`.
        """
        return self._tasks.known.lacking(self.tasks, self.task_rule if rule is None else rule_by_name(rule))

    def infer_tasks(
        self,
        *,
        priors: Mapping[str, float] | None = None,
        threshold: float | None = None,
        false_alarm_rate: float = FALSE_ALARM_RATE,
        **inputs: Any,
    ) -> TaskInference:
        """Return which finished task each input is of, judged by the base model's features alone.

        The rule is `task_rule`. Each input is judged alone. Tasks without statistics cannot be chosen.

        Args:
            priors: weights of tasks, in place of equal weights of all classes; 0, or no weight, excludes a task from
                the probabilities. Whether an input is of a known task is judged by all.
            threshold: the squared Mahalanobis distance to the nearest class mean from which on an input is of no known
                task; None: the one that fits `false_alarm_rate`.
            false_alarm_rate: the share of inputs of known tasks that may be taken for inputs of no known task. n
                validation examples in all allow 1/(n + 1) at least.
            **inputs: as in `forward`.

        Raises:
            TypeError, ValueError: an argument is invalid, or no task has statistics.
        """
        check_inputs(inputs)
        options = {"priors": priors, "threshold": threshold, "false_alarm_rate": false_alarm_rate}
        return infer(self, inputs, **options)

    # Computing

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
        task_names: Sequence[str] | str | None = None,
        top_k: int = 1,
        retention_features: Tensor | RetentionPairs | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return logits under the active task, or the base model's own output if no task is set.

        Args:
            input_ids: `[B, N]` integers; or instead `inputs_embeds`, `[B, N, E]`, or `pixel_values`.
            attention_mask: `[B, N]`, 1 for tokens and 0 for padding.
            token_type_ids, position_ids, decoder_input_ids, decoder_attention_mask: as the base model takes them.
            labels: `[B]` class indices, or those of the task's problem type (`qtuning_fast.method.labels`); for
                language modelling token ids, as the base model takes them. -100 leaves out a label.
            task_names: one finished task for each sample, which uses that task's adapter; or `"infer"`, to use that of
                the task that `infer_tasks` finds.
            top_k: with `"infer"`, ask the adapters of so many tasks, the likeliest, and take the one whose answer has
                the greatest probability `p(t|x) p_t(c|x)`. Only for tasks with heads. Where such a task's answer is not
                one class of several, the likeliest task is taken.
            retention_features: `[B, hidden]`, precomputed features of this batch under the previous task's adapter
                (`features`); None: they are computed here. Of a part of a batch that processes split,
                `RetentionPairs`, whose share weights memory retention.
            num_items_in_batch: divides the sum of the labels' losses, and weights memory retention by this batch's
                share of the items, so that losses add up over the batches of a step; None: the batch's own number.
            **kwargs: for the base model.

        Returns:
            `QTuningOutput` for classification, otherwise the base model's output. If memory retention applies, its
            `retention_loss` is set and included in `loss`. With inferred tasks its `task_index` and
            `is_known` are set.

        Raises:
            TypeError, ValueError: attention weights are requested, or `task_names` or `labels` are invalid.
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
        if top_k != 1 or isinstance(task_names, str):
            if labels is not None and self.has_heads:
                raise ValueError(
                    "labels belong to a named task, so they have no loss with inferred ones; leave them out"
                )
            with inferred(self, task_names, inputs, top_k) as found:
                output = self._compute(inputs, labels, num_items_in_batch, retention_features)
            output["task_index"], output["is_known"] = found.index, found.is_known
            return output
        if task_names is not None:
            with self.using(task_names, batch_size(inputs)):
                return self._compute(inputs, labels, num_items_in_batch, retention_features)
        return self._active.compute(self._compute, inputs, labels, num_items_in_batch, retention_features)

    def _compute(
        self,
        inputs: dict[str, Any],
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        retention_features: Tensor | RetentionPairs | None,
    ) -> Any:
        """Return loss and logits under the task that is set or those of a block, or the base model's own output."""
        task, mixed = self._active.current, self._mixed
        self.backbone.check_inputs(inputs, under_a_task=task is not None or mixed is not None)
        if mixed is not None:
            return self._computing.under_a_task(inputs, labels, num_items_in_batch, mixed)
        if task is None:
            return self.backbone.compute(inputs, labels)
        self._check_attached()
        self.backbone.injector.check_switched()
        if self.training and task.adapter is None and self.retains_memory:
            if labels is None:
                _warn_of_no_retention("forward got no labels (as with label smoothing or a loss of your own)")
            elif batch_size(inputs) == 1 and not isinstance(retention_features, RetentionPairs):
                _warn_of_no_retention("a batch of one sample has no pairs of samples to compare")
            else:
                if retention_features is None:
                    retention_features = self.features(inputs, task=self.learning.last_learned)
                return self._computing.retaining(inputs, labels, retention_features, num_items_in_batch)
        if task.is_live:
            self._active.place()  # the training prefix changes with every step
        return self._computing.under_a_task(inputs, labels, num_items_in_batch)

    def encode(self, inputs: dict[str, Any]) -> Tensor:
        """Return pooled features `[B, hidden]` of the inputs under the placed prefix.

        They are the mean over the tokens; in a causal model the last token, in an image model the class token, if any.

        Raises:
            NotImplementedError: an image model packs the images of a batch into one sequence.
        """
        return self._active.compute(self.backbone.encode, inputs, self._computing.pad_token_id)

    @torch.no_grad()
    def features(self, inputs: dict[str, Any], *, task: str | None) -> Tensor:
        """Return pooled features `[B, hidden]` under a finished task's adapter or, for None, of the base model alone.

        The active task does not change.
        """
        with self.keeping_task():
            self.set_task(task)
            return self.backbone.read(inputs, self._computing.pad_token_id)

    @contextmanager
    def keeping_task(self) -> Iterator[None]:
        """Set the task back to what it is now after the block, within which no other thread computes."""
        with self._active.kept():
            yield

    def generate(self, *args: Any, task_names: Sequence[str] | str | None = None, **kwargs: Any) -> Any:
        """Call the base model's `generate` under the active task, or under a finished task for each sample.

        The prefix is not in the cache and, with `placement="prefix"`, takes no positions.

        Args:
            *args, **kwargs: as the base model takes them.
            task_names: one finished task for each sample, or `"infer"`, as in `forward`; `top_k` means sampling here.

        Raises:
            ValueError: the base model cannot generate, or `task_names` is invalid.
        """
        self.backbone.check_generates()
        if isinstance(task_names, str):
            read = self.backbone.read_by_generate(args, kwargs)
            with torch.no_grad(), inferred(self, task_names, read), self.evaluating():
                return self.backbone.generate(*args, **kwargs)
        if task_names is not None:
            batch = args[0].shape[0] if args else batch_size(kwargs)
            with torch.no_grad(), self.using(task_names, batch), self.evaluating():
                return self.backbone.generate(*args, **kwargs)
        with torch.no_grad(), self.evaluating(), self._active:
            task = self._active.current
            if task is not None:
                self.backbone.injector.check_switched()
                if task.is_live:
                    self._active.place()
            return self.backbone.generate(*args, **kwargs)

    @contextmanager
    def using(self, task_names: Sequence[str], batch: int) -> Iterator[MixedBatch]:
        """Within the block, make each sample of a batch of this size compute under its own finished task.

        Raises:
            ValueError: a task is unknown, the number of names differs from `batch`, or one batch cannot hold the tasks.
        """
        self._check_attached()
        with self._active.mixed(), self._tasks.using(task_names, batch) as mixed:
            before, self._mixed = self._mixed, mixed
            try:
                yield mixed
            finally:
                self._mixed = before

    # As a module

    def train(self, mode: bool = True) -> QTuningModel:
        """Set the prompts' training mode; the backbone stays in eval mode, except for layers that checkpoint.

        Dropout in the backbone is therefore off, LoRA's included, even if LoRA's weights train beside the prompts.
        """
        with self.backbone.injector.lock:
            super().train(mode)
            self.backbone.freeze(training=mode)
        return self

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Set eval mode within the block; no layer checkpoints then, so caches are used."""
        with self._active.block():
            training = self.training
            self.eval()
            try:
                yield
            finally:
                self.train(training)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of the task in training by kind.

        The kinds are `prompt` (the new and the shared one), `reweighting`, `gate`, `head` and `network` (the
        reparametrisation and the discriminator).
        """
        return self.learning.parameter_groups()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # to(), cuda(), half(): the placed prefix moves along, and slots are allocated again.
        with self.backbone.injector.lock:
            self.slots.clear()
            super()._apply(*args, **kwargs)
            self._active.place_again()
        return self

    @property
    def _reads_inputs(self) -> PreTrainedModel:
        """The part of the base model that `forward` hands its inputs to."""
        return self.backbone.encoder if self.has_heads else self.base_model

    def __deepcopy__(self, memo: dict[int, Any]) -> QTuningModel:
        # Hooks on the base model and prefixes on its layers belong to this model: the copy gets its own.
        with self._active.off_the_layers() as task:
            copied = type(self).__new__(type(self))
            memo[id(self)] = copied
            copy.deepcopy(self._active, memo)  # first, which tells its hooks that they are copied with it
            copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        if task is not None:
            copied.set_task(task.name, live=task.is_live)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # For pickle. Others may compute before it is written, so this copies the structure, but no tensors.
        kept = self, self.adapters, self.statistics
        memo: dict[int, Any] = {id(x): x for x in (*kept, *self.parameters(), *self.buffers())}
        with self._active.off_the_layers() as task:
            copy.deepcopy(self._active, memo).remove_hooks()
            state = copy.deepcopy(self.__dict__, memo)
        base_model = state["backbone"].model
        requires = bool(getattr(base_model, "_require_grads_hooks", ()))
        base_model.disable_input_require_grads()  # this hook of transformers cannot be pickled
        return state | {"task_that_is_set": task and (task.name, task.is_live), "inputs_require_grads": requires}

    def __setstate__(self, state: dict[str, Any]) -> None:
        task, requires = state.pop("task_that_is_set"), state.pop("inputs_require_grads")
        super().__setstate__(state)
        self.name_inputs(self._reads_inputs)  # a pickle holds no functions
        if requires:
            self.base_model.enable_input_require_grads()
        if task is not None:
            self.set_task(task[0], live=task[1])

    # Saving

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Return the state of everything except the base model, for a checkpoint within a task."""
        return self.learning.state_dict()

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a `trainable_state_dict` of the same task, from this version or the previous one."""
        self.learning.load_trained(from_version_3(state))

    def save_pretrained(self, folder: str | Path, *, task: str | None = None) -> None:
        """Write the queue and the adapters of all finished tasks into a folder, replacing a checkpoint atomically.

        Args:
            folder: the folder.
            task: write this finished task alone, without the queue, for others to use.

        Raises:
            RuntimeError: a task is in training.
            ValueError: there is no such task.
        """
        checkpoint = checkpoint_of(self)
        write_checkpoint(Path(folder), checkpoint if task is None else checkpoint.of_task(task))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        task: str | None = None,
        card_data: Mapping[str, Any] | None = None,
        **options: Unpack[PushOptions],
    ) -> CommitInfo:
        """Push what `save_pretrained` writes into a repository of the Hugging Face hub, with a model card.

        The repository is made if there is none. The push is one commit, which replaces the checkpoint that was there; a
        model card that you wrote or edited stays.

        Args:
            repo_id: `user/name`, or a name among your own repositories.
            task: push this finished task alone, without the queue.
            card_data: metadata for the model card beside its own, such as `{"license": "mit", "language": "en"}`.
            **options: `private`, `token`, `revision`, `commit_message`, `commit_description` and `create_pr`, as in
                transformers (`PushOptions`).

        Returns:
            The commit, with its address.

        Raises:
            RuntimeError: a task is in training.
            ValueError: there is no such task, or the name cannot be that of a repository.
            HubError: the hub refuses, or cannot be reached.
        """
        saved = checkpoint_of(self).of_task(task)
        card = model_card(saved, repo_id, base_model=self.base_model.name_or_path, card_data=card_data)
        return push_checkpoint(saved, repo_id, str(card), **options)

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel,
        folder: str | Path,
        *,
        lazy: bool = False,
        **options: Unpack[DownloadOptions],
    ) -> QTuningModel:
        """Load a checkpoint onto the same base model; no task is set.

        Args:
            base_model: the model that the adapters were made for.
            folder: folder that `save_pretrained` wrote or, if there is no such folder, the name of a repository on the
                Hugging Face hub, such as `"user/name"`. Of a repository, only the files that its index names are
                downloaded. A `Path` is a folder in any case.
            lazy: read each adapter when it is first needed, and download it then; a file in a folder must exist then,
                and damage is detected then.
            **options: for a repository, `revision`, `token`, `cache_dir`, `local_files_only` and `force_download`, as
                in transformers (`DownloadOptions`).

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: a file is damaged, has an unknown format version, or belongs to another base model.
            HubError: the hub does not answer, or does not show the repository.
        """
        return restored(cls, base_model, located(folder, **options), lazy=lazy)

    def detach(self) -> PreTrainedModel:
        """Restore the base model to its original state and return it; no task can be set afterwards."""
        with self.backbone.injector.lock:
            self._active.forget()
            return self.backbone.detach()

    # Checks

    def _check_new(self, adapter: TaskAdapter) -> None:
        self._tasks.check_new(adapter)
        self._check_new_name(adapter.name)

    def _check_new_name(self, name: str) -> None:
        self._tasks.check_new_name(name)
        check_not_reserved(name)
        if name == self.learning.task:
            raise ValueError(f"task {name!r} is in training; give the adapter another name")

    def _check_attached(self) -> None:
        """Raise a `RuntimeError` after `detach`."""
        self.backbone.check_attached()
        if hasattr(type(self), "unshard"):  # FSDP2 changes the class of modules that it shards
            raise RuntimeError(
                "fully_shard was called with the QTuningModel; call it with the base model before attaching, because "
                "prompts change from task to task and cannot be sharded"
            )


def _warn_of_no_retention(reason: str) -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        warnings.warn(
            f"memory retention is left out of the loss, because {reason}; set retention_weight=0 if that is meant",
            stacklevel=3,
        )


def _prefix_of(learning: Learning, backbone: Backbone, num_layers: int, task: SetTask) -> Prefix:
    if task.is_live:
        return learning.prefix.prefix()
    assert task.adapter is not None
    return task.adapter.prefix(backbone.device, num_layers=num_layers)
