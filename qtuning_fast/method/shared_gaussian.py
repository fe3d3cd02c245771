"""Gaussian classes with one covariance, shrunk: the closed form of task inference, and the measure of distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtuning_fast.method.statistics import TaskStatistics, all_counts, all_means, summed_scatter
from qtuning_fast.method.task_rule import Evidence, LinearScores

FLOAT32_NOISE = torch.finfo(torch.float32).eps ** 2
"""The variance of a feature, relative to its mean square, up to which it is rounding."""


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
        means, seen = all_means(statistics), all_counts(statistics) > 0
        freedom = int(all_counts(statistics).sum() - seen.sum())
        scatter = summed_scatter([each.features for each in statistics])
        covariance, shrinkage = oas(scatter, freedom, noise=FLOAT32_NOISE * float(means.square().mean()))
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
