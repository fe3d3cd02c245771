"""Gaussians of each class's features, from which pseudo-features of earlier tasks are drawn.

HiDe-Prompt (Wang et al. 2023, arXiv 2310.07234) and NoRGa (Le et al. 2024, arXiv 2405.14124) re-balance one head over
all classes on them. A class is one Gaussian, with its full covariance or with variances alone, or up to ten with
variances, around the centroids of its examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

Clustering = Callable[[Tensor], Tensor]
"""Maps examples `[n, F]` to the numbers of their clusters, `[n]`."""

KINDS = ("covariance", "variance", "centroids")

RIDGE = 1e-4
"""What is added to every variance."""


@dataclass(frozen=True)
class ClassGaussians:
    """G Gaussians, each of one class, in float64. Several may share a factor of their covariance, of which there are K.

    Attributes:
        means: `[G, F]`.
        variances: `[G, F]`, added to the diagonal; zero where the factors say all.
        factors: `[K, r, F]`: the covariance of each is `factorᵀ factor + diag(variances) + RIDGE · I`.
        factor_of: the number of each one's factor, `[G]` int64.
        classes: the class of each, `[G]` int64.
        shares: the share of its class's examples that each stands for, `[G]`.
    """

    means: Tensor
    variances: Tensor
    factors: Tensor
    factor_of: Tensor
    classes: Tensor
    shares: Tensor

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
        parts = [
            _of_class(features[labels == label].double(), int(label), kind, clustered) for label in labels.unique()
        ]
        return cls.joined(parts, [0] * len(parts))

    @classmethod
    def joined(cls, parts: Sequence[ClassGaussians], first_classes: Sequence[int]) -> ClassGaussians:
        """Return several together, given the number that class 0 of each then has."""
        rows = max(part.factors.shape[1] for part in parts)
        factors = [F.pad(part.factors, (0, 0, 0, rows - part.factors.shape[1])) for part in parts]
        before = [0, *accumulate(len(each) for each in factors)]
        return cls(
            torch.cat([part.means for part in parts]),
            torch.cat([part.variances for part in parts]),
            torch.cat(factors),
            torch.cat([part.factor_of + number for part, number in zip(parts, before)]),
            torch.cat([part.classes + first for part, first in zip(parts, first_classes)]),
            torch.cat([part.shares for part in parts]),
        )

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw so many pseudo-features of each class: `[C · count, F]` float64, and their classes `[C · count]`.

        A class with several Gaussians is drawn from each by its share, rounded.
        """
        counts = self._counts(count)
        width, rows = self.means.shape[1], self.factors.shape[1]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        drawn = [
            mean + normal(number, rows) @ self.factors[factor] + deviation * normal(number, width)
            for mean, factor, deviation, number in zip(
                self.means, self.factor_of.tolist(), (self.variances + RIDGE).sqrt(), counts
            )
        ]
        return torch.cat(drawn), self.classes.repeat_interleave(torch.tensor(counts))

    def _counts(self, count: int) -> list[int]:
        """Return how many to draw of each Gaussian: its share, with what rounding leaves to the largest fractions."""
        wanted = self.shares * count
        counts = wanted.floor().long()
        for label in self.classes.unique():
            mine = (self.classes == label).nonzero()[:, 0]
            left = count - int(counts[mine].sum())
            largest = (wanted - counts)[mine].argsort(descending=True, stable=True)[:left]
            counts[mine[largest]] += 1
        return counts.tolist()

    def class_means(self) -> Tensor:
        """Return the mean of each class's examples, `[C, F]`, the classes in order."""
        weighted = self.shares[:, None] * self.means
        return torch.stack([weighted[self.classes == label].sum(0) for label in self.classes.unique()])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for saving."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ClassGaussians:
        """Rebuild them from the result of `tensors`.

        Raises:
            ValueError: a tensor is missing.
        """
        try:
            return cls(**{each.name: tensors[each.name] for each in fields(cls)})
        except KeyError as error:
            raise ValueError(f"these are not Gaussians of classes: {error} is missing") from None


def _of_class(x: Tensor, label: int, kind: str, clustered: Clustering | None) -> ClassGaussians:
    """Return those of one class, given its examples `[n, F]`."""
    if kind == "centroids" and clustered is not None:
        cluster = clustered(x)
        parts = [x[cluster == each] for each in cluster.unique()]
        means, variances = (torch.stack(each) for each in zip(*((y.mean(0), y.var(0, correction=0)) for y in parts)))
        shares = torch.tensor([len(part) / len(x) for part in parts], dtype=torch.float64)
    else:
        means, shares = x.mean(0, keepdim=True), torch.ones(1, dtype=torch.float64)
        variances = (x - means).square().sum(0, keepdim=True) / max(1, len(x) - 1)
    factors = x.new_zeros(1, 0, x.shape[1])
    if kind == "covariance":
        factors = torch.linalg.qr((x - means) / max(1, len(x) - 1) ** 0.5, mode="r").R[None]
        variances = torch.zeros_like(variances)
    groups = torch.zeros(len(means), dtype=torch.long)
    return ClassGaussians(means, variances, factors, groups, groups + label, shares)
