"""Which task is an input of? Calibrated probabilities over tasks and classes, each input judged alone.

A rule (`qtuning_fast.method.task_rules`) scores all classes; `p(c|x) = softmax(scores / T)` and `p(t|x)` is its sum
over the classes of task t. The temperature T minimises the log-loss of validation examples. An input that is farther
from every class mean than nearly all validation examples is of no known task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from numbers import Real

import torch
from torch import Tensor

from qtuning_fast.method.shared_gaussian import SharedGaussian
from qtuning_fast.method.statistics import validation_of
from qtuning_fast.method.task_rule import Candidate, Evidence, Scores, TaskRule
from qtuning_fast.method.temperature import best_temperature

_CPU = torch.device("cpu")

FALSE_ALARM_RATE = 0.01
CALIBRATED_ON = 2048
"""At most so many validation examples, so that calibration costs no more for many tasks."""


@dataclass(frozen=True)
class TaskInference:
    """Which task each of B inputs is of.

    Attributes:
        tasks: the tasks to choose from, T names in the order in which they were learned.
        classes: the number of classes of each.
        task_probabilities: `p(t|x)`, `[B, T]` float64 on the CPU.
        class_probabilities: `p(c|x)`, `[B, C]`, the classes of the first task, then those of the second, and so on.
        distances: squared Mahalanobis distance to the nearest class mean, `[B]`; None without statistics.
        threshold: the distance from which on an input is of no known task; inf without validation examples.
        false_alarm_rate: the share of inputs of known tasks that is expected beyond the threshold: the one that was
            asked for, but no less than 1/(n + 1) with n validation examples; None for a threshold of one's own.
        left_out: tasks that cannot be chosen, because they have no statistics.
    """

    tasks: tuple[str, ...]
    classes: tuple[int, ...]
    task_probabilities: Tensor
    class_probabilities: Tensor
    distances: Tensor | None
    threshold: float
    false_alarm_rate: float | None
    left_out: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.task_probabilities)

    @property
    def places(self) -> Tensor:
        """The place among `tasks` of each input's most probable task, `[B]` int64; of equals the first by name."""
        return self._ranked[:, 0]

    @property
    def task_names(self) -> list[str]:
        """The most probable task of each input; of equals the first by name, whichever was learned first."""
        return [self.tasks[place] for place in self.places.tolist()]

    @property
    def is_known(self) -> Tensor:
        """Whether each input is of a known task, `[B]` bool."""
        if self.distances is None:
            return torch.ones(len(self), dtype=torch.bool)
        return self.distances <= self.threshold

    def top(self, k: int) -> list[list[tuple[str, float]]]:
        """Return the k most probable tasks of each input and their probabilities, the most probable first."""
        ranked = self._ranked[:, :k]
        probabilities = self.task_probabilities.gather(1, ranked)
        return [
            [(self.tasks[index], p) for index, p in zip(*each)] for each in zip(ranked.tolist(), probabilities.tolist())
        ]

    @property
    def _ranked(self) -> Tensor:
        """The places of the tasks, the most probable first, `[B, T]`."""
        by_name = torch.tensor(sorted(range(len(self.tasks)), key=self.tasks.__getitem__))
        return by_name[self.task_probabilities[:, by_name].argsort(dim=1, descending=True, stable=True)]

    def surest(self, k: int, sureness: Tensor, compares: Tensor) -> Tensor:
        """Return which of the k most probable tasks has the most probable answer, `[B]`.

        Args:
            k: the number of tasks.
            sureness: the probability of each task's best answer given the task, `[B, k]`, in the order of `top`.
            compares: whether each task's answer is one class of several, `[B, k]`. If one of an input's is not, its
                probabilities cannot be compared, and the most probable task is taken.
        """
        weighed = self.task_probabilities.gather(1, self._ranked[:, :k]) * sureness
        return torch.where(compares.all(1), weighed.argmax(1), 0)

    def classes_of(self, task: str) -> Tensor:
        """Return `p(c|x)` of one task's classes, `[B, its classes]`."""
        index = self.tasks.index(task)
        return self.class_probabilities.split(self.classes, dim=1)[index]


@dataclass(frozen=True)
class FittedRule:
    """A rule that is fitted to tasks and calibrated.

    Attributes:
        candidates: the tasks, sorted by name, without their statistics, which would stay in memory.
        possible: how many classes of each have an example; of a task without statistics, all count.
        order: their names in the order in which they were learned.
        left_out: see `TaskInference`.
        scores: the rule's.
        gaussian: what distances are measured with; None without statistics.
        temperature: T.
        distances: those of validation examples, sorted, `[v]`.
        device: where the matrices are.
    """

    candidates: tuple[Candidate, ...]
    possible: tuple[int, ...]
    order: tuple[str, ...]
    left_out: tuple[str, ...]
    scores: Scores
    gaussian: SharedGaussian | None
    temperature: float
    distances: Tensor
    device: torch.device = _CPU

    @classmethod
    def fit(cls, rule: TaskRule, candidates: Sequence[Candidate], *, left_out: Sequence[str] = ()) -> FittedRule:
        """Fit a rule to tasks, given in the order in which they were learned.

        Raises:
            ValueError: there is no task.
        """
        if not candidates:
            raise ValueError("there is no task to choose")
        ordered = sorted(candidates, key=lambda each: each.name)
        statistics = [each.statistics for each in ordered if each.statistics is not None]
        classes = sum(each.classes for each in ordered)
        scores = rule.fit(ordered)
        gaussian, temperature, distances = None, 1.0, torch.zeros(0, dtype=torch.float64)
        if len(statistics) == len(ordered):
            gaussian = scores if isinstance(scores, SharedGaussian) else SharedGaussian.of(statistics)
            features, labels = validation_of(statistics, most=CALIBRATED_ON)
            evidence = Evidence(features.double(), _no_inputs)
            if len(labels):
                found = _checked(scores(evidence), classes, len(labels)) if rule.needs_statistics else None
                distances = gaussian.distances(evidence, found if scores is gaussian else None).sort().values
                if found is not None:
                    temperature = best_temperature(found, labels)
        names = tuple(each.name for each in candidates)
        described = tuple(replace(each, statistics=None) for each in ordered)
        possible = tuple(_possible_classes(each) for each in ordered)
        return cls(described, possible, names, tuple(left_out), scores, gaussian, temperature, distances)

    def to(self, device: torch.device) -> FittedRule:
        """Return the same with its matrices on a device, or on the CPU if they cannot be there."""
        scores_to = getattr(self.scores, "to", None)
        if scores_to is None or device.type == "mps":  # which has no float64
            device = _CPU
        if device == self.device or scores_to is None:
            return self
        if isinstance(self.scores, SharedGaussian):  # the same that distances are measured with
            both = self.scores.to(device)
            return replace(self, scores=both, gaussian=both, device=device)
        gaussian = None if self.gaussian is None else self.gaussian.to(device)
        return replace(self, scores=scores_to(device), gaussian=gaussian, device=device)

    def infer(
        self,
        evidence: Evidence,
        *,
        priors: Mapping[str, float] | None = None,
        threshold: float | None = None,
        false_alarm_rate: float = FALSE_ALARM_RATE,
    ) -> TaskInference:
        """Return the tasks of the inputs; see `QTuningModel.infer_tasks`."""
        evidence = replace(evidence, features=_finite(evidence.features).to(self.device, torch.float64))
        scores = _checked(self.scores(evidence), sum(each.classes for each in self.candidates), len(evidence.features))
        sizes, columns, tasks = self._layout
        classes = _possible(scores.cpu().double() / self.temperature + self._log_priors(priors)).softmax(1)[:, columns]
        by_task = classes.new_zeros(len(classes), len(sizes)).scatter_add_(1, tasks.expand_as(classes), classes)
        distances = None
        if self.gaussian is not None:
            distances = self.gaussian.distances(evidence, scores if self.scores is self.gaussian else None).cpu()
        return TaskInference(
            tasks=self.order,
            classes=sizes,
            task_probabilities=by_task,
            class_probabilities=classes,
            distances=distances,
            threshold=self.threshold(false_alarm_rate) if threshold is None else _as_threshold(threshold),
            false_alarm_rate=self.promised(false_alarm_rate) if threshold is None else None,
            left_out=self.left_out,
        )

    @cached_property
    def _layout(self) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Return, in the order of learning: the classes of each task, and of each class its column and its task."""
        sizes = {each.name: each.classes for each in self.candidates}
        first = dict(zip(sizes, accumulate(sizes.values(), initial=0)))
        columns = [first[name] + number for name in self.order for number in range(sizes[name])]
        tasks = [task for task, name in enumerate(self.order) for _ in range(sizes[name])]
        return tuple(sizes[name] for name in self.order), torch.tensor(columns), torch.tensor(tasks)

    def threshold(self, false_alarm_rate: float) -> float:
        """Return the distance that this share of inputs of known tasks exceeds, judged by the validation examples."""
        if not isinstance(false_alarm_rate, Real) or not 0 < false_alarm_rate < 1:
            raise ValueError(f"false_alarm_rate is {false_alarm_rate!r}; it must be a number between 0 and 1")
        count = len(self.distances)
        if count == 0:
            return math.inf
        place = math.ceil((count + 1) * (1 - false_alarm_rate))  # as in conformal prediction
        return float(self.distances[min(place, count) - 1])

    def promised(self, false_alarm_rate: float) -> float:
        """Return the share that is expected beyond the threshold for a rate; n distances allow 1/(n + 1) at least."""
        count = len(self.distances)
        return 0.0 if count == 0 else max(false_alarm_rate, 1 / (count + 1))

    def _log_priors(self, priors: Mapping[str, float] | None) -> Tensor:
        """Return the log prior of each class, `[C]`, up to a constant: that of its task, shared by its classes.

        A class without an example has no share, because no input can be of it.
        """
        if priors is None:
            return torch.zeros(sum(each.classes for each in self.candidates), dtype=torch.float64)
        check_priors(priors, [each.name for each in self.candidates])
        shares = []
        for each, possible in zip(self.candidates, self.possible):
            shares += [float(priors.get(each.name, 0.0)) / possible] * each.classes
        return torch.tensor(shares, dtype=torch.float64).log()


def _possible_classes(candidate: Candidate) -> int:
    statistics = candidate.statistics
    return candidate.classes if statistics is None else int(statistics.features.seen.sum())


def check_priors(priors: Mapping[str, float], names: Sequence[str]) -> None:
    """Raise a TypeError or ValueError unless these are priors of some of the tasks."""
    if not isinstance(priors, Mapping):
        raise TypeError(f"priors is a {type(priors).__name__}; it must map tasks to numbers")
    known = set(names)
    for name, prior in priors.items():
        if name not in known:
            raise ValueError(f"priors names task {name!r}, which cannot be chosen; the tasks are {', '.join(names)}")
        if isinstance(prior, bool) or not isinstance(prior, Real) or not 0 <= prior < math.inf:
            raise ValueError(f"priors gives task {name!r} {prior!r}; it must be a finite number, 0 or more")
    if not sum(priors.values()) > 0:
        raise ValueError("priors gives no task more than 0; give at least one")


def _finite(features: Tensor) -> Tensor:
    """Return features `[B, F]`, or raise a ValueError."""
    wrong = ~features.isfinite().all(1)
    if wrong.any():
        raise ValueError(
            f"the features of input {int(wrong.nonzero()[0])} are not finite; the base model's precision may be too "
            "low for it: load it in bfloat16 or float32"
        )
    return features


def _checked(scores: Tensor, classes: int, inputs: int) -> Tensor:
    """Return a rule's scores, or raise a ValueError."""
    if scores.shape != (inputs, classes):
        raise ValueError(f"the rule's scores have shape {list(scores.shape)}; it must be {[inputs, classes]}")
    if not (scores < torch.inf).all() or not (scores > -torch.inf).any(1).all():
        raise ValueError("the rule's scores are NaN or inf, or exclude every class of an input")
    return scores


def _possible(scores: Tensor) -> Tensor:
    """Return scores with priors, or raise a ValueError if an input could be of no task."""
    impossible = scores.isneginf().all(1)
    if impossible.any():
        raise ValueError(
            f"priors excludes every task that the rule finds possible for input {int(impossible.nonzero()[0])}; give "
            "more tasks a prior"
        )
    return scores


def _as_threshold(threshold: float) -> float:
    """Return a threshold, or raise a ValueError."""
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not threshold >= 0:
        raise ValueError(f"threshold is {threshold!r}; it must be a squared distance, 0 or more")
    return float(threshold)


def _no_inputs() -> Mapping[str, Tensor]:
    raise RuntimeError("features alone are at hand here, so adapters cannot be asked")
