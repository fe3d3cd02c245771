"""What is kept of a task's examples to tell its inputs from those of other tasks.

The features are those of the base model without any task. Of the training examples sums are kept: per class the count
and the mean, and per task the scatter around the class means, as a triangular factor: a few-shot task takes some
hundred kilobytes, not F². Such sums add up exactly, whatever the order of tasks and however examples are split between
batches and processes (streaming discriminant analysis: Hayes and Kanan 2020, arXiv 1909.01520). Of the validation
examples up to 64 feature vectors are kept as they are, for calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FEATURES = "features"
"""The name of the moments of the features themselves."""

FeatureMap = Callable[[Tensor], Tensor]
"""Maps features `[n, F]` to others, `[n, M]`, both in float64."""

Labelled = tuple[Tensor, Tensor]
"""Features `[n, F]` and class indices `[n]`."""

KEPT_FOR_CALIBRATION = 64
_FACTORS_AT_ONCE = 16  # a product of few rows spends its time on reading and writing the sum


@dataclass(frozen=True)
class ClassMoments:
    """Count and mean of each class, and the scatter around the means, in float64.

    Attributes:
        counts: `[C]` int64; 0 for a class without examples, whose mean is zero and means nothing.
        means: `[C, F]`.
        factor: `[r, F]`, upper triangular, r = min(n, F): the scatter is `factorᵀ factor`.
    """

    counts: Tensor
    means: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> ClassMoments:
        """Return the moments of features `[n, F]` with class indices `[n]`."""
        x = features.double()
        counts = torch.bincount(labels, minlength=classes)
        sums = x.new_zeros(classes, x.shape[1]).index_add_(0, labels, x)
        means = sums / counts.clamp(min=1)[:, None]
        return cls(counts, means, _triangular(x - means[labels]))

    @property
    def seen(self) -> Tensor:
        """Whether each class has an example, `[C]`."""
        return self.counts > 0

    @property
    def scatter(self) -> Tensor:
        """The sum over examples of `(φ − μ)(φ − μ)ᵀ` around their class means, `[F, F]`."""
        return self.factor.mT @ self.factor

    def merged(self, other: ClassMoments) -> ClassMoments:
        """Return the moments of both sets of examples together (Chan, Golub and LeVeque 1979)."""
        total = self.counts + other.counts
        share = other.counts.double() / total.clamp(min=1)
        apart = other.means - self.means
        means = self.means + share[:, None] * apart
        both = self.seen & other.seen
        between = (self.counts * share).sqrt()[:, None] * apart  # one row for each class that both have
        return ClassMoments(total, means, _triangular(torch.cat([self.factor, other.factor, between[both]])))


def _triangular(rows: Tensor) -> Tensor:
    """Return an upper triangular R `[min(n, F), F]` with `RᵀR = rowsᵀ rows`."""
    # Row by row in memory, as a file holds it: sums in a matrix product may depend on the layout.
    return rows if len(rows) == 0 else torch.linalg.qr(rows, mode="r").R.contiguous()


@dataclass(frozen=True)
class TaskStatistics:
    """What is kept of one task's examples.

    Attributes:
        moments: the moments of the features, under the name `FEATURES`, and of what other feature maps make of them.
        validation_features: `[v, F]` float32, of up to 64 examples that the moments do not count: the task's inferred
            probabilities are calibrated on them.
        validation_labels: their classes, `[v]` int64.

    Raises:
        ValueError: shapes, types or values do not fit together, or no class has an example.
    """

    moments: Mapping[str, ClassMoments]
    validation_features: Tensor
    validation_labels: Tensor

    def __post_init__(self) -> None:
        _check(self)

    @property
    def features(self) -> ClassMoments:
        """The moments of the features themselves."""
        return self.moments[FEATURES]

    @property
    def classes(self) -> int:
        """The number of classes, C; those without an example count."""
        return len(self.features.counts)

    @property
    def hidden_size(self) -> int:
        """The length of a feature vector, F."""
        return self.features.means.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for saving."""
        named = {"validation.features": self.validation_features, "validation.labels": self.validation_labels}
        for name, moments in self.moments.items():
            named |= {f"{name}.{part}": getattr(moments, part) for part in ("counts", "means", "factor")}
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TaskStatistics:
        """Rebuild statistics from the result of `tensors`.

        Raises:
            ValueError: they are not such tensors.
        """
        names = [name.removesuffix(".counts") for name in tensors if name.endswith(".counts")]
        try:
            moments = {
                name: ClassMoments(*(tensors[f"{name}.{part}"] for part in ("counts", "means", "factor")))
                for name in names
            }
            return cls(moments, tensors["validation.features"], tensors["validation.labels"])
        except KeyError as error:
            raise ValueError(f"these are not statistics of a task: {error} is missing") from None


def _check(found: TaskStatistics) -> None:
    """Raise a ValueError if shapes, types or values do not fit together."""
    if FEATURES not in found.moments:
        raise ValueError(f"these are not statistics of a task: moments of {FEATURES!r} are missing")
    features, labels, counts = found.validation_features, found.validation_labels, found.features.counts
    right = labels.shape == features.shape[:1] and labels.dtype == torch.long and features.dtype == torch.float32
    right = right and features.shape[1:] == found.features.means.shape[1:] and bool(features.isfinite().all())
    right = right and (len(labels) == 0 or 0 <= int(labels.min()) <= int(labels.max()) < len(counts))
    right = right and counts.dtype == torch.long and counts.ndim == 1 and bool((counts >= 0).all())
    right = right and all(_fits(each, counts) for each in found.moments.values())
    if not right or not found.features.seen.any():
        raise ValueError("these are not statistics of a task: shapes, types or values do not fit together")


def _fits(moments: ClassMoments, counts: Tensor) -> bool:
    """Return whether the moments are of so many examples of each class."""
    means, factor = moments.means, moments.factor
    right = means.ndim == factor.ndim == 2 and len(means) == len(counts) and means.shape[1] == factor.shape[1]
    right = right and means.dtype == factor.dtype == torch.float64 and torch.equal(moments.counts, counts)
    return right and bool(means.isfinite().all() and factor.isfinite().all())


@dataclass
class Recorder:
    """Adds up the statistics of a task, batch by batch, in memory that does not grow with the number of examples.

    Sent to another process, it leaves out the feature maps, which may be functions that cannot be pickled.

    Args:
        classes: the number of classes, C.
        maps: feature maps by name whose moments are kept too.
    """

    classes: int
    maps: Mapping[str, FeatureMap] = field(default_factory=dict)
    _moments: dict[str, ClassMoments] = field(default_factory=dict, init=False)
    _waiting: list[Labelled] = field(default_factory=list, init=False)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Count examples.

        Args:
            features: `[n, F]`.
            labels: `[n]` class indices.

        Raises:
            ValueError: shapes do not fit, a feature is not finite, or a label is out of range.
        """
        self._waiting.append(_checked(features, labels, self.classes, self._size))
        waiting = sum(len(each) for _, each in self._waiting)
        if waiting >= max(features.shape[1], 1024):  # one QR for many rows
            self._count()

    def absorb(self, other: Recorder) -> None:
        """Count what another recorder of the same task has counted, in another process for example."""
        self._count()
        other._count()
        for name, found in other._moments.items():
            self._moments[name] = self._moments[name].merged(found) if name in self._moments else found

    def finish(self, validation: Iterable[Labelled] = ()) -> TaskStatistics:
        """Return the statistics.

        Args:
            validation: features and labels of further examples, of which up to 64 are kept.

        Raises:
            ValueError: no example was added, or the validation examples are invalid.
        """
        self._count()
        if FEATURES not in self._moments or not self._moments[FEATURES].seen.any():
            raise ValueError("there are no examples to record statistics of; give some")
        size = self._moments[FEATURES].means.shape[1]
        parts = [_checked(features, labels, self.classes, size) for features, labels in validation]
        features = torch.cat([part[0] for part in parts]) if parts else torch.zeros(0, size)
        labels = torch.cat([part[1] for part in parts]) if parts else torch.zeros(0, dtype=torch.long)
        kept = spread(features, KEPT_FOR_CALIBRATION)
        return TaskStatistics(dict(self._moments), features[kept].float(), labels[kept])

    @property
    def _size(self) -> int | None:
        """The length of a feature vector; None before the first."""
        if self._waiting:
            return self._waiting[0][0].shape[1]
        return self._moments[FEATURES].means.shape[1] if self._moments else None

    def __getstate__(self) -> dict[str, Any]:
        self._count()
        return self.__dict__ | {"maps": {}}

    def _count(self) -> None:
        if not self._waiting:
            return
        features = torch.cat([each for each, _ in self._waiting]).double()
        labels = torch.cat([each for _, each in self._waiting])
        self._waiting.clear()
        for name, of in {FEATURES: _unchanged, **self.maps}.items():
            found = ClassMoments.of(of(features), labels, self.classes)
            self._moments[name] = self._moments[name].merged(found) if name in self._moments else found


def spread(features: Tensor, most: int) -> Tensor:
    """Return the indices of up to `most` of the features `[n, F]`, spread evenly, whatever their order."""
    if len(features) <= most:
        return torch.arange(len(features))
    direction = torch.arange(features.shape[1], dtype=torch.float64).cos()
    order = (features.double() @ direction).argsort(stable=True)
    return order[((torch.arange(most, dtype=torch.float64) + 0.5) / most * len(features)).long()]


def all_means(statistics: Sequence[TaskStatistics]) -> Tensor:
    """Return the means of the features of all tasks' classes, `[C, F]`."""
    return torch.cat([each.features.means for each in statistics])


def all_counts(statistics: Sequence[TaskStatistics]) -> Tensor:
    """Return the number of examples of all tasks' classes, `[C]`."""
    return torch.cat([each.features.counts for each in statistics])


def summed_scatter(moments: Sequence[ClassMoments]) -> Tensor:
    """Return the sum of the scatters, `[F, F]`."""
    total = moments[0].factor.new_zeros(moments[0].factor.shape[1], moments[0].factor.shape[1])
    for first in range(0, len(moments), _FACTORS_AT_ONCE):
        rows = torch.cat([each.factor for each in moments[first : first + _FACTORS_AT_ONCE]])
        total.addmm_(rows.mT, rows)
    return total


def validation_of(statistics: Sequence[TaskStatistics], most: int | None = None) -> Labelled:
    """Return features `[v, F]` of the tasks' validation examples, and their classes among those of all tasks.

    Examples of a class that the moments have not seen are left out.

    Args:
        statistics: those of the tasks.
        most: keep so many at most, as many of each task as of the others, but at least one; they are spread evenly.
    """
    each_at_most = None if most is None else max(1, most // max(1, len(statistics)))
    features, labels, before = [], [], 0
    for each in statistics:
        usable = each.features.seen[each.validation_labels]
        its_features, its_labels = each.validation_features[usable], each.validation_labels[usable] + before
        kept = spread(its_features, len(its_features) if each_at_most is None else each_at_most)
        features.append(its_features[kept])
        labels.append(its_labels[kept])
        before += each.classes
    return torch.cat(features), torch.cat(labels)


def _unchanged(features: Tensor) -> Tensor:
    return features


def _checked(features: Tensor, labels: Tensor, classes: int, size: int | None) -> Labelled:
    """Return features and labels on the CPU, or raise a ValueError."""
    features, labels = features.detach().cpu(), labels.detach().cpu().long()
    if features.ndim != 2 or size not in (None, features.shape[1]):
        raise ValueError(f"features has shape {list(features.shape)}; it must be [n, {size or 'F'}]")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"there are {len(features)} examples, but labels has shape {list(labels.shape)}")
    if not features.isfinite().all():
        raise ValueError(
            "a feature of the base model is not finite; its precision may be too low for these inputs: load it in "
            "bfloat16 or float32"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise ValueError(f"labels holds {int(wrong)}; the task has {classes} classes, so it must be 0 to {classes - 1}")
    return features, labels
