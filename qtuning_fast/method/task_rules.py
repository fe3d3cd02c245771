"""Rules that score the classes of all tasks, given statistics of each task and the input's features.

A rule of your own is a class with a `fit`; docs/recipes/task-inference.md has one of ten lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qtuning_fast.method.labels import SINGLE
from qtuning_fast.method.statistics import FEATURES, FeatureMap, TaskStatistics, summed_scatter, validation_of

_FLOAT32_NOISE = torch.finfo(torch.float32).eps ** 2


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


class ClosedForm(TaskRule):
    """Gaussian classes with one shared covariance, shrunk: nothing is tuned, nothing is trained.

    It is linear discriminant analysis with the covariance of `SharedGaussian`.
    """

    name = "closed-form"

    def fit(self, candidates: Sequence[Candidate]) -> Scores:
        """Return `μ_cᵀ Σ⁻¹ φ − ½ μ_cᵀ Σ⁻¹ μ_c` as a function of φ."""
        return SharedGaussian.of([each.known for each in candidates])


class NearestMean(TaskRule):
    """The class whose mean is nearest (as in Rebuffi et al. 2017, arXiv 1611.07725).

    Scores are those of Gaussian classes with one variance for all features.
    """

    name = "nearest-mean"

    def fit(self, candidates: Sequence[Candidate]) -> Scores:
        """Return `(μ_cᵀ φ − ½ μ_cᵀ μ_c) / σ²` as a function of φ, σ² the mean variance of a feature within classes."""
        statistics = [each.known for each in candidates]
        means, seen = _means(statistics), _seen(statistics)
        freedom = max(1, int(_counts(statistics).sum() - seen.sum()))
        variance = sum(float(each.features.factor.square().sum()) for each in statistics) / freedom / means.shape[1]
        if variance <= _FLOAT32_NOISE * float(means.square().mean()):
            variance = 1.0
        bias = (-0.5 * means.square().sum(1) / variance).masked_fill(~seen, -torch.inf)
        return LinearScores(means / variance, bias)


class RanPAC(TaskRule):
    """Ridge regression from fixed random features to the class (McDonnell et al. 2023, arXiv 2307.02251).

    Its Gram matrix adds up over tasks as the scatter does. The strength of the ridge is the one, of powers of ten, with
    the least squared error on the validation examples. The tasks need moments of its random features: choose the rule
    before recording statistics.

    Args:
        size: number of random features, M.
        seed: seed of the random directions.

    Raises:
        ValueError: the size is no positive integer.
    """

    name = "ranpac"

    def __init__(self, size: int = 2000, seed: int = 0) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size is {size!r}; it must be a positive integer, the number of random features")
        self.size, self.seed = size, seed
        self.feature_map = f"relu-{size}-{seed}"
        self._maps: dict[int, RandomFeatures] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """Size and seed."""
        return {"size": self.size, "seed": self.seed}

    def map(self, features: Tensor) -> Tensor:
        """Return `relu(φ W)`, `[n, M]`, with W drawn from N(0, 1)."""
        return self._random_features(features.shape[1])(features)

    def _random_features(self, width: int) -> RandomFeatures:
        if width not in self._maps:
            generator = torch.Generator().manual_seed(self.seed)
            self._maps[width] = RandomFeatures(torch.randn(width, self.size, generator=generator, dtype=torch.float64))
        return self._maps[width]

    def fit(self, candidates: Sequence[Candidate]) -> Scores:
        """Return `s_cᵀ (G + λI)⁻¹ h` as a function of h = relu(φ W): s_c sums h over class c, G sums `h hᵀ` over all.

        λ is a power of ten times the mean eigenvalue of G; without validation examples a hundredth of it.
        """
        statistics = [each.known for each in candidates]
        moments = [each.moments[self.feature_map] for each in statistics]
        means = torch.cat([each.means for each in moments])  # [C, M]
        sums = torch.cat([each.counts for each in moments])[:, None] * means
        gram = summed_scatter(moments).addmm_(means.mT, sums)
        values, vectors = torch.linalg.eigh(gram)
        values, turned = values.clamp(min=0), sums @ vectors
        unit = values.mean().clamp(min=torch.finfo(torch.float64).tiny)
        features, labels = validation_of(statistics)
        validation = self.map(features.double()) @ vectors
        targets = torch.eye(len(sums), dtype=torch.float64)[labels]

        def error(power: int) -> float:
            return float((validation @ (turned / (values + unit * 10.0**power)).mT - targets).square().sum())

        best = min(range(-8, 4), key=error) if len(labels) else -2
        weight = turned / (values + unit * 10.0**best) @ vectors.mT
        bias = weight.new_zeros(len(sums)).masked_fill(~_seen(statistics), -torch.inf)
        return LinearScores(weight, bias, self._random_features(statistics[0].hidden_size))


class MostConfident(TaskRule):
    """The task whose adapter is surest of its answer; for comparison.

    It needs no statistics, but a pass for each task. Confidences of different tasks are not comparable, so it is often
    wrong. All tasks must have answers that are one class of several.
    """

    name = "most-confident"
    needs_statistics = False

    def check(self, task: str, problem_type: str) -> None:
        """Raise a ValueError if the answers of a task are not one class of several."""
        if problem_type != SINGLE:
            raise ValueError(
                f"rule {self.name!r} compares probabilities of classes, but task {task!r} has "
                f"problem_type={problem_type!r}; choose another rule"
            )

    def fit(self, candidates: Sequence[Candidate]) -> Scores:
        """Return `log p_t(c|x)` of each task's most probable class; −inf for its others.

        Raises:
            ValueError: the answers of a task are not one class of several.
        """
        for each in candidates:
            self.check(each.name, each.problem_type)
        names = [each.name for each in candidates]

        def scores(evidence: Evidence) -> Tensor:
            asked = evidence.ask_adapters()
            rows = [asked[name].double().log() for name in names]
            return torch.cat([row.masked_fill(row < row.amax(1, keepdim=True), -torch.inf) for row in rows], dim=1)

        return scores


RULES: dict[str, Callable[..., TaskRule]] = {
    rule.name: rule for rule in (ClosedForm, NearestMean, RanPAC, MostConfident)
}


def rule_by_name(rule: TaskRule | str) -> TaskRule:
    """Return a rule given itself or the name of one of `RULES`.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(rule, TaskRule):
        return rule
    if not isinstance(rule, str):
        raise TypeError(f"rule is a {type(rule).__name__}; it must be a TaskRule or one of {', '.join(RULES)}")
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(RULES)}")
    return RULES[rule]()


@dataclass(frozen=True)
class SharedGaussian:
    """Gaussian classes with one covariance for all of them, shrunk towards a multiple of the identity.

    Attributes:
        linear: the scores `μ_cᵀ Σ⁻¹ φ − ½ μ_cᵀ Σ⁻¹ μ_c`.
        whitening: `[F, F]`, W with `WᵀW = Σ⁻¹`.
        shrinkage: ρ.
    """

    linear: LinearScores
    whitening: Tensor
    shrinkage: float

    @classmethod
    def of(cls, statistics: Sequence[TaskStatistics]) -> SharedGaussian:
        """Fit to the statistics of tasks: `Σ = (1−ρ) S/m + ρ tr(S/m)/F I`, m the degrees of freedom."""
        means, seen = _means(statistics), _seen(statistics)
        freedom = int(_counts(statistics).sum() - seen.sum())
        scatter = summed_scatter([each.features for each in statistics])
        covariance, shrinkage = oas(scatter, freedom, noise=_FLOAT32_NOISE * float(means.square().mean()))
        lower = torch.linalg.cholesky(covariance)
        whitening = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=torch.float64), upper=False)
        white = means @ whitening.mT  # [C, F]
        bias = (-0.5 * white.square().sum(1)).masked_fill(~seen, -torch.inf)
        return cls(LinearScores(white @ whitening, bias), whitening, shrinkage)

    def to(self, device: torch.device) -> SharedGaussian:
        """Return the same on a device."""
        return SharedGaussian(self.linear.to(device), self.whitening.to(device), self.shrinkage)

    def __call__(self, evidence: Evidence) -> Tensor:
        return self.linear(evidence)

    def distances(self, evidence: Evidence, scores: Tensor | None = None) -> Tensor:
        """Return the squared Mahalanobis distance to the nearest class mean, `[B]` (Lee et al. 2018, 1807.03888).

        Args:
            evidence: what is known of the inputs.
            scores: the scores of the inputs by this model, `[B, C]`, where they have been computed already.
        """
        scores = self.linear(evidence) if scores is None else scores
        white = evidence.features @ self.whitening.mT
        return (white.square().sum(1) - 2 * scores.amax(1)).clamp(min=0)


def oas(scatter: Tensor, freedom: int, *, noise: float = 0.0) -> tuple[Tensor, float]:
    """Shrink a covariance by the oracle approximating estimator (Chen, Wiesel, Eldar and Hero 2010, arXiv 0907.4698).

    Args:
        scatter: S, `[F, F]` float64.
        freedom: m, the number of examples less that of the means around which S was taken.
        noise: variance of a feature up to which S counts as zero.

    Returns:
        The covariance, and ρ. The identity and 1 where S is zero or m is not positive.
    """
    size = len(scatter)
    identity = torch.eye(size, dtype=torch.float64)
    trace = float(scatter.trace()) / max(freedom, 1)
    if freedom <= 0 or trace / size <= noise:
        return identity, 1.0
    covariance = scatter / freedom
    shrinkage = oas_shrinkage(size, freedom, trace, float(covariance.square().sum()))
    return (1 - shrinkage) * covariance + shrinkage * trace / size * identity, shrinkage


def oas_shrinkage(size: int, freedom: int, trace: float, squares: float) -> float:
    """Return ρ of the oracle approximating estimator; see `oas`.

    Args:
        size: number of features.
        freedom: m.
        trace, squares: the trace of `Ŝ = S/m`, and the sum of its squared entries, `tr(Ŝ²)`.
    """
    numerator = (1 - 2 / size) * squares + trace**2
    denominator = (freedom + 1 - 2 / size) * (squares - trace**2 / size)
    return 1.0 if denominator <= 0 else min(1.0, numerator / denominator)


def _means(statistics: Sequence[TaskStatistics]) -> Tensor:
    return torch.cat([each.features.means for each in statistics])


def _counts(statistics: Sequence[TaskStatistics]) -> Tensor:
    return torch.cat([each.features.counts for each in statistics])


def _seen(statistics: Sequence[TaskStatistics]) -> Tensor:
    return _counts(statistics) > 0
