"""A forward pass under a task: features, the logits of the heads, the loss, and memory retention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qtuning_fast.method.config import HEAD_TASK_TYPES, QTuningConfig
from qtuning_fast.method.labels import check_labels, counted, label_loss, share_of_items
from qtuning_fast.method.retention import RetentionPairs
from qtuning_fast.model.active_task import ActiveTask
from qtuning_fast.model.backbone import Backbone
from qtuning_fast.model.device_slots import MixedBatch
from qtuning_fast.model.learning import Learning
from qtuning_fast.model.output import QTuningOutput, batch_size, twice


class Computing:
    """What a model computes under the task that is on its layers.

    Args:
        backbone, learning, active: parts of the model.
        layers: indices of the layers that get a prefix.
        config: see `QTuningConfig`.

    Attributes:
        task_configs: for some tasks by name a config that replaces the base model's.
    """

    def __init__(
        self, backbone: Backbone, learning: Learning, active: ActiveTask, layers: Sequence[int], config: QTuningConfig
    ) -> None:
        self._backbone = backbone
        self._learning = learning
        self._active = active
        self._layers = layers
        self._config = config
        self._has_heads = config.task_type in HEAD_TASK_TYPES
        self.task_configs: dict[str, PreTrainedConfig] = {}

    @property
    def pad_token_id(self) -> int | None:
        """The token that pads inputs without a mask.

        Users set it on the config of one task, and it is meant for all, which share a tokenizer. The configs of tasks
        are copies of the base model's, so one that differs from it has been set.
        """
        task, base = self._active.current, getattr(self._backbone.model.config, "pad_token_id", None)
        mine = [self.task_configs[task.name]] if task is not None and task.name in self.task_configs else []
        for config in (*mine, *self.task_configs.values()):
            token: int | None = getattr(config, "pad_token_id", None)
            if token != base:
                return token
        return base

    def under_a_task(
        self,
        inputs: dict[str, Any],
        labels: Tensor | None,
        num_items: Tensor | int | None = None,
        mixed: MixedBatch | None = None,
    ) -> Any:
        """Return loss and logits under the placed prefix."""
        if not self._has_heads:
            return self._backbone.compute_under_a_task(inputs, labels, num_items)
        features, states = self._backbone.encode_with_states(inputs, self.pad_token_id)
        logits = self._logits(features) if mixed is None else mixed.logits(features)
        loss = None if labels is None else self._loss(logits, labels, num_items, mixed)
        return QTuningOutput(loss=loss, logits=logits, hidden_states=states)

    def retaining(
        self,
        inputs: dict[str, Any],
        labels: Tensor,
        retention_features: Tensor | RetentionPairs,
        num_items: Tensor | int | None = None,
    ) -> Any:
        """Run a step with memory retention: the batch under the training prefix and under the shared prompt alone."""
        injector, batch = self._backbone.injector, batch_size(inputs)
        if self._has_heads:  # one pass of twice the batch
            index = torch.arange(2, device=self._backbone.device).repeat_interleave(batch)
            with injector.keeping():
                injector.place(self._layers, self._learning.prefix.prefix_with_shared(index))
                both, states = self._backbone.encode_with_states(twice(inputs), self.pad_token_id)
            features, shared_features = both.chunk(2)
            logits = self._logits(features)
            states = None if states is None else tuple(each[:batch] for each in states)
            loss = self._loss(logits, labels, num_items)
            output: Any = QTuningOutput(loss=loss, logits=logits, hidden_states=states)
        else:
            index = torch.ones(batch, dtype=torch.long, device=self._backbone.device)
            with injector.keeping():
                injector.place(self._layers, self._learning.prefix.prefix_with_shared(index))
                shared_features = self._backbone.read(inputs, self.pad_token_id)
            self._active.place()
            output = self.under_a_task(inputs, labels, num_items)
        retention = self._learning.retention_loss(shared_features, retention_features)
        weight: Tensor | float = self._config.retention_weight
        if isinstance(retention_features, RetentionPairs):  # by samples, whatever number of labels each has
            weight = weight * retention_features.share
        elif num_items is not None:  # summed over the batches of a step, the shares are 1
            counts = (
                counted(output.logits, labels, self._labelled()[0])
                if self._has_heads
                else self._backbone.counted(labels)
            )
            weight = weight * share_of_items(counts, num_items).to(retention.device)
        output["loss"] = output.loss + weight * retention
        output["retention_loss"] = retention
        return output

    def _logits(self, features: Tensor) -> Tensor:
        task = self._active.current
        assert task is not None
        return self._learning.logits(features) if task.adapter is None else task.adapter.logits(features)

    def _loss(
        self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None, mixed: MixedBatch | None = None
    ) -> Tensor:
        """Return the loss of the heads' logits, once the labels have been checked."""
        problem_type, tasks, outputs = self._labelled(mixed)
        check_labels(labels, problem_type, tasks, outputs, logits.shape[0])
        return label_loss(logits, labels, problem_type, num_items)

    def _labelled(self, mixed: MixedBatch | None = None) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
        """Return the problem type, and each sample's task and number of outputs, or those of the only task."""
        if mixed is not None:
            return mixed.problem_type, mixed.names, mixed.classes
        task = self._active.current
        assert task is not None
        if task.adapter is None:
            return self._learning.problem_type, (task.name,), (len(self._learning.label_names),)
        info = task.adapter.info
        return info.problem_type, (task.name,), (info.classes,)
