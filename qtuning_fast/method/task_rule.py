"""What a rule is that scores the classes of all tasks: what it is given, and what it returns.

A rule of your own is a class with a `fit`; docs/recipes/task-inference.md has one of ten lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qtuning_fast.method.labels import SINGLE
from qtuning_fast.method.statistics import FEATURES, FeatureMap, TaskStatistics


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at for a batch of B inputs.

    Attributes:
        features: `[B, F]` float64, of the base model without any task.
        ask_adapters: runs all finished tasks, and returns by task the probabilities `[B, classes]` that its adapter
            gives. It costs one pass a task.
    """

    features: Tensor
    ask_adapters: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Candidate:
    """A task that an input may belong to.

    Attributes:
        name: its name.
        classes: the number of its classes.
        statistics: what was recorded of its examples; None if the rule needs none and there are none.
        problem_type: what its labels mean (`qtuning_fast.method.labels`).
    """

    name: str
    classes: int
    statistics: TaskStatistics | None
    problem_type: str = SINGLE

    @property
    def known(self) -> TaskStatistics:
        """The statistics, of a rule that needs them."""
        assert self.statistics is not None
        return self.statistics


Scores = Callable[[Evidence], Tensor]
"""Maps the evidence of B inputs to scores `[B, C]` of the classes of all tasks, in the order of the candidates. Their
softmax, at a temperature, is the probability of a class; −inf excludes one. The evidence is on the CPU, unless these
scores have a method `to(device)`, as `LinearScores` has."""


@dataclass(frozen=True)
class RandomFeatures:
    """The map `relu(φ W)`; see `RanPAC`.

    Attributes:
        directions: W, `[F, M]` float64.
    """

    directions: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return (features @ self.directions).relu()

    def to(self, device: torch.device) -> RandomFeatures:
        return RandomFeatures(self.directions.to(device))


@dataclass(frozen=True)
class LinearScores:
    """Scores that are linear in the features, or in random features of them.

    Attributes:
        weight, bias: `[C, F]` and `[C]` float64; a class without examples has the bias −inf.
        map: the random features, or None.
    """

    weight: Tensor
    bias: Tensor
    map: RandomFeatures | None = None

    def __call__(self, evidence: Evidence) -> Tensor:
        features = evidence.features if self.map is None else self.map(evidence.features)
        return features @ self.weight.mT + self.bias

    def to(self, device: torch.device) -> LinearScores:
        """Return the same on a device."""
        moved = None if self.map is None else self.map.to(device)
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device), map=moved)


class TaskRule:
    """Base class of rules.

    Attributes:
        name: what users call it.
        feature_map: the name under which moments of `map` are recorded; by default those of the features themselves.
        needs_statistics: whether a task without statistics cannot be chosen. Such a rule is calibrated on features
            alone, without asking adapters.
    """

    name: str
    feature_map = FEATURES
    needs_statistics = True

    @property
    def has_own_features(self) -> bool:
        """Whether moments of `map` are recorded beside those of the features."""
        return self.feature_map != FEATURES

    @property
    def maps(self) -> dict[str, FeatureMap]:
        """The feature map whose moments are recorded too, by its name; none for a rule without features of its own."""
        return {self.feature_map: self.map} if self.has_own_features else {}

    @property
    def settings(self) -> dict[str, Any]:
        """What the class takes to make the rule again, for JSON."""
        return {}

    def check(self, task: str, problem_type: str) -> None:
        """Raise a ValueError if the rule cannot choose a task of this problem type."""

    def map(self, features: Tensor) -> Tensor:
        """Return what the rule makes of features `[n, F]` in float64, for rules that need moments of something else."""
        return features

    def fit(self, candidates: Sequence[Candidate]) -> Scores:
        """Return the function that scores the classes of these tasks.

        Args:
            candidates: the tasks, sorted by name, so that sums do not depend on the order in which they were learned.
        """
        raise NotImplementedError
