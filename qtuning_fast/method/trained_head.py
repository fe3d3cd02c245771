"""A task rule with a trained head over all classes, as HiDe-Prompt infers the task of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtuning_fast.method.class_gaussians import ClassGaussians
from qtuning_fast.method.closed_form import LinearHead
from qtuning_fast.method.settings import check_integer
from qtuning_fast.method.statistics import ClassMoments
from qtuning_fast.method.task_adaptive import Rebalancing, rebalanced
from qtuning_fast.method.task_rule import Candidate, LinearScores, Scores, TaskRule


class TrainedHead(TaskRule):
    """A linear head that is trained on pseudo-features of the base model's classes (arXiv 2310.07234, TII).

    Its pseudo-features are drawn from the moments that every task records: each class is a Gaussian around its mean
    with the covariance within the classes of its task. The head starts from zero whenever tasks are fitted, so the
    order of tasks does not matter; features are centred and scaled for it. The paper's head learns from each task's
    examples first, and reads features as they are.

    Args:
        epochs: passes over pseudo-features.
        rate: learning rate of the first pass.
        seed: of the draws.

    Raises:
        TypeError, ValueError: an argument is no such number.
    """

    name = "trained-head"

    def __init__(self, epochs: int = 30, rate: float = 5e-3, seed: int = 0) -> None:
        check_integer("epochs", epochs, 1)
        check_integer("seed", seed, 0)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ValueError(f"rate is {rate!r}; it must be a positive number")
        self.epochs, self.rate, self.seed = epochs, rate, seed

    @property
    def settings(self) -> dict[str, Any]:
        """Epochs, rate and seed."""
        return {"epochs": self.epochs, "rate": self.rate, "seed": self.seed}

    def fit(self, candidates: Sequence[Candidate]) -> Scores:
        """Return `w_c·φ + b_c` as a function of φ; a class without examples is never answered."""
        counts = torch.cat([each.known.features.counts for each in candidates])
        means = torch.cat([each.known.features.means for each in candidates])[counts > 0]
        middle, size = means.mean(0), _size(candidates, means)
        parts = [_gaussians(each.known.features, middle, size) for each in candidates]
        sizes = [each.known.classes for each in candidates]
        first = [sum(sizes[:place]) for place in range(len(sizes))]
        zero = torch.zeros(sum(sizes), candidates[0].known.hidden_size, dtype=torch.float64)
        start = LinearHead(zero, zero.new_zeros(len(zero)))
        how = Rebalancing(self.epochs, self.rate)
        head = rebalanced(start, ClassGaussians.joined(parts, first), how, seed=self.seed)
        weight = head.weight / size
        bias = (head.bias - weight @ middle).masked_fill(counts == 0, -torch.inf)
        return LinearScores(weight, bias)


def _size(candidates: Sequence[Candidate], means: Tensor) -> float:
    """Return the root of the mean variance of a feature, within and between classes; 1 where there is none."""
    within = sum(float(each.known.features.factor.square().sum()) for each in candidates)
    count = sum(int(each.known.features.counts.sum()) for each in candidates)
    between = float((means - means.mean(0)).square().mean())
    return (within / count / means.shape[1] + between) ** 0.5 or 1.0


def _gaussians(moments: ClassMoments, middle: Tensor, size: float) -> ClassGaussians:
    """Return those of a task's classes, all with the covariance within them, centred and scaled."""
    classes = moments.seen.nonzero()[:, 0]
    freedom = max(1, int(moments.counts.sum()) - len(classes))
    means = (moments.means[classes] - middle) / size
    factor = moments.factor / size / freedom**0.5
    return ClassGaussians(
        means, torch.zeros_like(means), factor[None], torch.zeros_like(classes), classes, torch.ones_like(means[:, 0])
    )
