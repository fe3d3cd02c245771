"""The tasks that the input of a model may be of: their statistics, and the rule that chooses among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtuning_fast.method.adapter import AdapterInfo
from qtuning_fast.method.labels import IGNORED, class_count
from qtuning_fast.method.statistics import ClassMoments, Labelled, Recorder, TaskStatistics
from qtuning_fast.method.task_inference import FittedRule
from qtuning_fast.method.task_rule import Candidate, TaskRule
from qtuning_fast.method.task_rules import ClosedForm
from qtuning_fast.model.backbone import Backbone
from qtuning_fast.model.distributed import gathered_from
from qtuning_fast.model.output import read_inputs
from qtuning_fast.model.registry import AdapterRegistry, StatisticsInfo, StatisticsRegistry

INFER = "infer"
"""In place of task names: each sample's task is inferred."""

Batch = Mapping[str, Any]
"""Inputs of the base model and their `labels`."""


@dataclass
class _Fitted:
    """The rule, fitted to all tasks, and what it was fitted to."""

    of: tuple[Any, ...]
    rule: FittedRule


class KnownTasks:
    """Statistics of finished tasks and the rule that chooses among them.

    Args:
        adapters, statistics: the registries of the tasks.
        backbone: the model whose features tell tasks apart.

    Attributes:
        statistics: the registry of the tasks' statistics.
    """

    def __init__(self, adapters: AdapterRegistry, statistics: StatisticsRegistry, backbone: Backbone) -> None:
        self.statistics = statistics
        statistics.check_all(partial(_check_stored, hidden_size=backbone.hidden_size))
        self._rule: TaskRule = ClosedForm()
        self._adapters = adapters
        self._backbone = backbone
        self._fitted: _Fitted | None = None
        self._means: dict[
            str, Tensor
        ] = {}  # of the classes of tasks, some kilobytes a task, so that statistics on disk are read once

    @property
    def rule(self) -> TaskRule:
        """The rule."""
        return self._rule

    @rule.setter
    def rule(self, rule: TaskRule) -> None:
        self._rule, self._fitted = rule, None  # perhaps the same object, with other settings

    # Statistics

    def add(self, name: str, statistics: TaskStatistics) -> None:
        """Set the statistics of a finished task.

        Raises:
            TypeError, ValueError: they do not fit the task or the model.
        """
        self.check(self._adapters.entry(name).info, statistics)
        self._means.pop(name, None)
        self.statistics.add(StatisticsInfo.of(name, statistics), value=statistics)

    def check(self, info: AdapterInfo, statistics: TaskStatistics) -> None:
        """Raise a TypeError or ValueError if statistics do not fit a task or the model."""
        if not isinstance(statistics, TaskStatistics):
            raise TypeError(f"statistics is a {type(statistics).__name__}; it must be a TaskStatistics")
        found, wanted = (statistics.classes, statistics.hidden_size), (classes_of(info), self._backbone.hidden_size)
        if found != wanted:
            raise ValueError(
                f"the statistics have {found[0]} classes and {found[1]} features, but task {info.name!r} has "
                f"{wanted[0]} and the base model {wanted[1]}"
            )

    def remove(self, name: str) -> None:
        """Remove the statistics of a task, if it has some."""
        self._means.pop(name, None)
        if name in self.statistics:
            self.statistics.remove(name)

    def record(
        self,
        name: str,
        batches: Iterable[Batch],
        validation: Iterable[Batch],
        features: Callable[[dict[str, Any]], Tensor],
    ) -> TaskStatistics:
        """Record the statistics of a finished task; see `QTuningModel.record_statistics`.

        Args:
            features: returns the features `[B, F]` of inputs.
        """
        task = self._adapters.entry(name)
        info = task.info

        def mine() -> tuple[Recorder, list[Labelled]]:
            recorder = Recorder(classes_of(info), self.rule.maps)
            for batch in batches:
                recorder.add(*self._labelled(batch, info, features))
            return recorder, [self._labelled(batch, info, features) for batch in validation]

        processes = gathered_from(mine)
        together = Recorder(classes_of(info))
        for their_recorder, _ in processes:
            together.absorb(their_recorder)
        statistics = together.finish([part for _, parts in processes for part in parts])
        with self._backbone.injector.lock:
            if name not in self._adapters or self._adapters.entry(name) is not task:
                raise ValueError(f"task {name!r} was removed while its statistics were recorded; record them again")
            self.add(name, statistics)
        return statistics

    def _labelled(self, batch: Batch, info: AdapterInfo, features: Callable[[dict[str, Any]], Tensor]) -> Labelled:
        """Return the features of a batch and its class indices, without samples whose label is left out."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"a batch is a {type(batch).__name__}; it must map names of inputs, and labels, to tensors")
        device = self._backbone.device
        inputs = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in read_inputs(batch).items()}
        found = features(inputs).cpu()
        labels = class_indices(batch.get("labels"), info, len(found))
        counts = labels != IGNORED
        return found[counts], labels[counts]

    def nearest(
        self, moments: ClassMoments, label_names: Sequence[str], *, among: Sequence[str], limit: int
    ) -> list[str]:
        """Return the finished tasks that are most like a new one, the likest first.

        Tasks with the same classes come first, then those whose class means are nearest to the new ones; tasks without
        statistics come last, the newest first.

        Args:
            moments: those of the new task's features.
            label_names: its classes.
            among: the tasks that may be returned, the oldest first.
            limit: how many are returned at most.
        """
        means, classes = moments.means[moments.seen], set(label_names)

        def unlikeness(place: int, name: str) -> tuple[bool, float, int]:
            differs = not classes or set(self._adapters.entry(name).info.label_names) != classes
            distance = math.inf
            if name in self.statistics:
                distance = float(torch.cdist(means, self._means_of(name)).amin(1).mean())
            return differs, distance, -place

        places = {name: place for place, name in enumerate(among)}
        return sorted(places, key=lambda name: unlikeness(places[name], name))[:limit]

    def _means_of(self, name: str) -> Tensor:
        """Return the class means of a task that has statistics, `[C, F]`."""
        if name not in self._means:
            moments = self.statistics[name].features
            self._means[name] = moments.means[moments.seen]
        return self._means[name]

    # The rule

    def fitted(self) -> FittedRule:
        """Return the rule, fitted to all tasks on the model's device; it is kept until a task comes or goes.

        Raises:
            ValueError: no task can be chosen.
        """
        of = self._adapters.version, self.statistics.version, self._backbone.device
        fitted = self._fitted
        if fitted is None or fitted.of != of:
            fitted = self._fitted = _Fitted(of, self.fit(list(self._adapters), self.rule).to(of[-1]))
        return fitted.rule

    def fit(self, names: Sequence[str], rule: TaskRule) -> FittedRule:
        """Return a rule, fitted to some of the tasks, in the order of the names.

        Raises:
            ValueError: no task can be chosen.
        """
        left_out = self.lacking(names, rule)
        lack = set(left_out)
        able = [name for name in names if name not in lack]
        if not able:
            raise ValueError(
                "no task can be inferred, because there are no finished tasks yet"
                if not left_out
                else f"no task can be inferred: rule {rule.name!r} needs statistics, which {', '.join(left_out)} "
                f"{'lack' if len(left_out) > 1 else 'lacks'}; call record_statistics for each with some of its examples"
            )
        return FittedRule.fit(rule, [self._candidate(name) for name in able], left_out=left_out)

    def lacking(self, names: Sequence[str], rule: TaskRule) -> list[str]:
        """Return those of the tasks that a rule cannot choose, because they have not the statistics that it needs."""
        return [name for name in names if rule.needs_statistics and not self._has(name, rule)]

    def _has(self, name: str, rule: TaskRule) -> bool:
        return name in self.statistics and rule.feature_map in self.statistics.entry(name).info.feature_maps

    def _candidate(self, name: str) -> Candidate:
        info = self._adapters.entry(name).info
        return Candidate(name, classes_of(info), self.statistics.get(name), info.problem_type)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fitted": None}  # it may hold functions, which cannot be pickled


def _check_stored(info: StatisticsInfo, statistics: TaskStatistics, *, hidden_size: int) -> None:
    """Raise a ValueError if statistics that were read from a file are not of the base model's features."""
    if statistics.hidden_size != hidden_size:
        raise ValueError(
            f"the statistics of task {info.name!r} have {statistics.hidden_size} features, but the base model has "
            f"{hidden_size}"
        )


def classes_of(info: AdapterInfo) -> int:
    """Return the number of classes that a finished task counts as; see `class_count`."""
    return class_count(info.problem_type, info.label_names)


def class_indices(labels: Any, info: AdapterInfo, batch: int) -> Tensor:
    """Return the class index of each sample of a batch, `[B]` int64.

    Args:
        labels: those of the batch; they do not matter if the task counts as one class.
        info: the description of the task.
        batch: B.

    Raises:
        TypeError, ValueError: the labels are no class indices.
    """
    if classes_of(info) == 1:
        return torch.zeros(batch, dtype=torch.long)
    needed = f"task {info.name!r} has {classes_of(info)} classes; a batch needs labels, [{batch}] class indices"
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is {'missing' if labels is None else f'a {type(labels).__name__}'}, but {needed}")
    if labels.is_floating_point() or labels.shape not in ((batch,), (batch, 1)):
        raise ValueError(f"labels is {labels.dtype} of shape {list(labels.shape)}, but {needed}")
    return labels.detach().reshape(-1).cpu().long()
