"""Heads in closed form: what a few examples say of a task before any step of training.

For classes it is the Gaussian classifier by which tasks are inferred (`qtuning_fast.method.task_rules.ClosedForm`), of
one task alone: class means and one covariance, shrunk (Chen, Wiesel, Eldar and Hero 2010, arXiv 0907.4698). Several
labels have one such classifier each, numbers a linear regression with such a covariance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtuning_fast.method.labels import IGNORED, MULTI, REGRESSION, SINGLE, counted, example_losses
from qtuning_fast.method.task_rules import oas_shrinkage
from qtuning_fast.method.temperature import best_temperature

NEVER = -1e4
"""The output for a class that no example has."""

_FOLDS = 5


@dataclass(frozen=True)
class LinearHead:
    """A linear map of features.

    Attributes:
        weight: `[outputs, F]` float64.
        bias: `[outputs]` float64; `NEVER`, or nearly so, for a class that no example has.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Map features `[n, F]` to outputs `[n, outputs]` in float64."""
        return features.double() @ self.weight.mT + self.bias

    @property
    def seen(self) -> Tensor:
        """Whether an example has each class, `[outputs]`."""
        return self.bias > NEVER / 2  # training moves it a little

    def scaled(self, factor: float) -> LinearHead:
        """Return the head with its outputs scaled, but for `NEVER`."""
        return LinearHead(self.weight * factor, torch.where(self.seen, self.bias * factor, NEVER))

    def mixed(self, others: Sequence[LinearHead]) -> LinearHead:
        """Return the sum of this head and of the mean of others for the same classes, both of the same norm.

        What another head says of classes of which it has seen no example does not count.
        """
        theirs = _sum([other._of_unit_norm() for other in others])._of_unit_norm()
        both = _sum([self._of_unit_norm(), theirs])
        return LinearHead(both.weight, both.bias.masked_fill(~self.seen, NEVER))

    def _of_unit_norm(self) -> LinearHead:
        """Return a head with the same differences between the classes seen, up to a factor, and weights of norm 1.

        Its outputs for other classes are 0, the mean of those seen.
        """
        seen = self.seen
        weight = (self.weight - self.weight[seen].mean(0)).masked_fill(~seen[:, None], 0.0)
        bias = (self.bias - self.bias[seen].mean()).masked_fill(~seen, 0.0)
        norm = max(float(weight.norm()), 1e-12)
        return LinearHead(weight / norm, bias / norm)


def _sum(heads: Sequence[LinearHead]) -> LinearHead:
    return LinearHead(
        torch.stack([head.weight for head in heads]).sum(0), torch.stack([head.bias for head in heads]).sum(0)
    )


def closed_form_head(features: Tensor, labels: Tensor, outputs: int, problem_type: str = SINGLE) -> LinearHead:
    """Return the head of one task in closed form.

    Args:
        features: `[n, F]`.
        labels: of n examples, as `qtuning_fast.method.labels` has them; examples that are left out do not count.
        outputs: number of outputs.
        problem_type: what the labels mean.
    """
    x = features.double()
    if problem_type == SINGLE:
        y = labels.reshape(-1).long()
        return _classes(x[y != IGNORED], y[y != IGNORED], outputs)
    y = labels.reshape(len(x), outputs).double()
    if problem_type == REGRESSION:
        return _numbers(x, y)
    heads = [_yes_or_no(x[column != IGNORED], column[column != IGNORED] >= 0.5) for column in y.mT]
    return LinearHead(torch.stack([weight for weight, _ in heads]), torch.stack([bias for _, bias in heads]))


def _classes(x: Tensor, y: Tensor, classes: int) -> LinearHead:
    """`μ_cᵀ Σ⁻¹ φ − ½ μ_cᵀ Σ⁻¹ μ_c`, Σ the shrunk covariance within classes."""
    counts = torch.bincount(y, minlength=classes)
    means = x.new_zeros(classes, x.shape[1]).index_add_(0, y, x) / counts.clamp(min=1)[:, None]
    weight = _solve(x - means[y], len(y) - int((counts > 0).sum()), means)
    bias = -0.5 * (means * weight).sum(1)
    return LinearHead(weight, bias.masked_fill(counts == 0, NEVER))


def _yes_or_no(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The log-odds of one label: the difference of its two classes, and the logarithm of how often it is there."""
    there, total = int(y.sum()), len(y)
    prior = torch.tensor((there + 1) / (total - there + 1), dtype=torch.float64).log()  # Laplace's rule of succession
    if there in (0, total):
        return x.new_zeros(x.shape[1]), prior
    head = _classes(x, y.long(), 2)
    return head.weight[1] - head.weight[0], head.bias[1] - head.bias[0] + prior


def _numbers(x: Tensor, y: Tensor) -> LinearHead:
    """`ȳ + cov(y, φ) Σ⁻¹ (φ − φ̄)`, Σ the shrunk covariance of the features."""
    middle, target, freedom = x.mean(0), y.mean(0), max(1, len(x) - 1)
    weight = _solve(x - middle, len(x) - 1, (y - target).mT @ (x - middle) / freedom)
    return LinearHead(weight, target - weight @ middle)


def _solve(rows: Tensor, freedom: int, right: Tensor) -> Tensor:
    """Return `right Σ⁻¹`, `Σ = (1−ρ) S/m + ρ tr(S/m)/F I` with `S = rowsᵀ rows`; Σ is the identity where S is zero.

    Only the rows' products with each other are needed (Woodbury), and few-shot tasks have fewer rows than features.

    Args:
        rows: `[n, F]`, centred.
        freedom: m.
        right: `[k, F]`.
    """
    n, size = rows.shape
    gram = rows @ rows.mT
    trace = float(gram.trace()) / max(freedom, 1)
    if freedom <= 0 or trace <= 0:
        return right
    shrinkage = oas_shrinkage(size, freedom, trace, float(gram.square().sum()) / freedom**2)
    ridge, scale = shrinkage * trace / size, (1 - shrinkage) / freedom
    inner = ridge * torch.eye(n, dtype=torch.float64) + scale * gram
    return (right - scale * torch.linalg.solve(inner, rows @ right.mT).mT @ rows) / ridge


@dataclass(frozen=True)
class Examples:
    """Features of a task's examples, and labels as `qtuning_fast.method.labels` has them.

    Attributes:
        features: `[n, F]`.
        labels: of the n examples.
    """

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, chosen: Tensor) -> Examples:
        """Return some of the examples."""
        return Examples(self.features[chosen], self.labels[chosen])


HeadMaker = Callable[[Examples], LinearHead]


def judged_head(
    make: HeadMaker, examples: Examples, validation: Examples | None, problem_type: str = SINGLE
) -> tuple[LinearHead, Tensor]:
    """Return a head made from examples, and its losses on examples that it was not made from.

    These are the examples themselves in a cross-validation, each fold by a head that is made from the others, and the
    validation examples. One temperature, at which the loss on all of them is least, scales the head.

    Args:
        make: makes a head.
        examples: what it is made from.
        validation: further examples.
        problem_type: what the labels mean.

    Returns:
        The scaled head, and the loss of each example, `[m]` float64; they are the same examples for every `make`. m is
        0 if nothing is left to judge by.
    """
    head = make(examples)
    judged = [] if validation is None else [(head(validation.features), validation.labels)]
    place = _places(examples, problem_type)
    for fold in place.unique().tolist() if int(place.max()) else ():
        out = place == fold
        rest, held_out = examples.rows(~out), examples.rows(out)
        judged.append((make(rest)(held_out.features), held_out.labels))
    if not judged:
        return head, torch.zeros(0, dtype=torch.float64)
    outputs, labels = (torch.cat(part) for part in zip(*judged))
    if problem_type == SINGLE:  # no head can be judged by a class that it was not shown
        labels = labels.reshape(-1).long()
        shown = (labels != IGNORED) & (outputs.gather(1, labels.clamp(min=0)[:, None])[:, 0] > NEVER / 2)
        outputs, labels = outputs[shown], labels[shown]
    if not len(outputs):
        return head, outputs.new_zeros(0)
    temperature = _temperature(outputs, labels, problem_type)
    scaled = head if problem_type == REGRESSION else head.scaled(1 / temperature)
    return scaled, example_losses(outputs / temperature, labels, problem_type)


def _places(examples: Examples, problem_type: str) -> Tensor:
    """Return the fold of each example, `[n]`; the examples of a class are dealt to the folds in turn."""
    turn = torch.arange(len(examples))
    if problem_type == SINGLE:
        labels = examples.labels.reshape(-1).long()
        for label in labels.unique():
            turn[labels == label] = torch.arange(int((labels == label).sum()))
    return turn % _FOLDS


def _temperature(outputs: Tensor, labels: Tensor, problem_type: str) -> float:
    if problem_type == REGRESSION:
        return 1.0
    if problem_type == SINGLE:
        return best_temperature(outputs, labels)
    counts = counted(outputs, labels, MULTI)
    log_odds = outputs[counts]
    return best_temperature(torch.stack([torch.zeros_like(log_odds), log_odds], 1), (labels[counts] >= 0.5).long())
