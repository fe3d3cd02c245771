"""Rules that score the classes of all tasks, given statistics of each task and the input's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qtuning_fast.method.labels import SINGLE
from qtuning_fast.method.shared_gaussian import FLOAT32_NOISE, SharedGaussian
from qtuning_fast.method.statistics import all_counts, all_means, summed_scatter, validation_of
from qtuning_fast.method.task_rule import Candidate, Evidence, LinearScores, RandomFeatures, Scores, TaskRule
from qtuning_fast.method.trained_head import TrainedHead


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
        means, seen = all_means(statistics), all_counts(statistics) > 0
        freedom = max(1, int(all_counts(statistics).sum() - seen.sum()))
        variance = sum(float(each.features.factor.square().sum()) for each in statistics) / freedom / means.shape[1]
        if variance <= FLOAT32_NOISE * float(means.square().mean()):
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
        bias = weight.new_zeros(len(sums)).masked_fill(all_counts(statistics) == 0, -torch.inf)
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
    rule.name: rule for rule in (ClosedForm, NearestMean, RanPAC, TrainedHead, MostConfident)
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
