"""Gaussians of each class's features, from which pseudo-features of earlier tasks are drawn.

HiDe-Prompt (Wang et al. 2023, arXiv 2310.07234) and NoRGa (Le et al. 2024, arXiv 2405.14124) re-balance one head over
all classes on them. A class is one Gaussian, with its full covariance or with variances alone, or up to ten with
variances, around the centroids of its examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Clustering = Callable[[Tensor], Tensor]
"""Maps examples `[n, F]` to the numbers of their clusters, `[n]`."""

KINDS = ("covariance", "variance", "centroids")

RIDGE = 1e-4
"""What is added to every variance."""


@dataclass(frozen=True)
class ClassGaussians:
    """G Gaussians, each of one class, in float64.

    Attributes:
        means: `[G, F]`.
        factors: `[G, r, F]`: the covariance of each is `factorᵀ factor + RIDGE · I`.
        variances: `[G, F]`, added to its diagonal; zero where the factors say all.
        classes: the class of each, `[G]` int64.
    """

    means: Tensor
    factors: Tensor
    variances: Tensor
    classes: Tensor

    @classmethod
    def of(
        cls, features: Tensor, labels: Tensor, kind: str = "covariance", *, clustered: Clustering | None = None
    ) -> ClassGaussians:
        """Fit them to features `[n, F]` with class indices `[n]`.

        Args:
            features, labels: the examples.
            kind: one of `KINDS`. A covariance and a variance are those of a sample, over n − 1.
            clustered: for centroids, what divides the examples of a class.

        Raises:
            ValueError: the kind is unknown or lacks its clustering, there is no example, or a feature is not finite.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        if kind == "centroids" and clustered is None:
            raise ValueError("kind is 'centroids', so clustered must divide the examples of a class")
        if not len(features):
            raise ValueError("there is no example to fit a Gaussian to")
        if not features.isfinite().all():
            raise ValueError("a feature is not finite; the base model's precision may be too low for these inputs")
        found = [
            (*each, int(label))
            for label in labels.unique()
            for each in _gaussians(features[labels == label].double(), kind, clustered)
        ]
        rows = max(len(factor) for _, factor, _, _ in found)
        return cls(
            torch.stack([mean for mean, _, _, _ in found]),
            torch.stack([_with_rows(factor, rows) for _, factor, _, _ in found]),
            torch.stack([variance for _, _, variance, _ in found]),
            torch.tensor([label for _, _, _, label in found]),
        )

    @classmethod
    def joined(cls, parts: Sequence[ClassGaussians], first_classes: Sequence[int]) -> ClassGaussians:
        """Return those of several tasks together, given the number that the first class of each then has."""
        rows = max(part.factors.shape[1] for part in parts)
        factors = [_with_rows(factor, rows) for part in parts for factor in part.factors]
        return cls(
            torch.cat([part.means for part in parts]),
            torch.stack(factors),
            torch.cat([part.variances for part in parts]),
            torch.cat([part.classes + first for part, first in zip(parts, first_classes)]),
        )

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw so many pseudo-features of each Gaussian: `[G · count, F]` float64, and their classes `[G · count]`."""
        groups, rows, width = self.factors.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        drawn = self.means[:, None] + normal(groups, count, rows) @ self.factors
        drawn += (self.variances + RIDGE).sqrt()[:, None] * normal(groups, count, width)
        return drawn.flatten(0, 1), self.classes.repeat_interleave(count)

    def class_means(self) -> Tensor:
        """Return the mean of each class's Gaussians, `[C, F]`, the classes in order."""
        return torch.stack([self.means[self.classes == label].mean(0) for label in self.classes.unique()])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for saving."""
        return {name: getattr(self, name) for name in ("means", "factors", "variances", "classes")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ClassGaussians:
        """Rebuild them from the result of `tensors`.

        Raises:
            ValueError: a tensor is missing.
        """
        try:
            return cls(*(tensors[name] for name in ("means", "factors", "variances", "classes")))
        except KeyError as error:
            raise ValueError(f"these are not Gaussians of classes: {error} is missing") from None


_Gaussian = tuple[Tensor, Tensor, Tensor]
"""Mean `[F]`, factor `[r, F]`, variances `[F]`."""


def _gaussians(x: Tensor, kind: str, clustered: Clustering | None) -> Sequence[_Gaussian]:
    """Return those of one class, given its examples `[n, F]`."""
    mean, none = x.mean(0), x.new_zeros(0, x.shape[1])
    if kind == "covariance":
        factor = torch.linalg.qr((x - mean) / max(1, len(x) - 1) ** 0.5, mode="r").R
        return [(mean, factor, torch.zeros_like(mean))]
    if clustered is None:
        return [(mean, none, (x - mean).square().sum(0) / max(1, len(x) - 1))]
    cluster = clustered(x)
    parts = [x[cluster == each] for each in cluster.unique()]
    return [(part.mean(0), none, part.var(0, correction=0)) for part in parts]


def _with_rows(factor: Tensor, rows: int) -> Tensor:
    return torch.cat([factor, factor.new_zeros(rows - len(factor), factor.shape[1])])
