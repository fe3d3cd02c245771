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
from qtuning_fast.method.shared_gaussian import oas_shrinkage
from qtuning_fast.method.statistics import ClassMoments
from qtuning_fast.method.temperature import best_temperature

_FOLDS = 5
_LEAST_SCALE = 1e-2  # where answers are no better than chance, the best scale is 0, at which all are the same


@dataclass(frozen=True)
class LinearHead:
    """A linear map of features.

    Attributes:
        weight: `[outputs, F]` float64.
        bias: `[outputs]` float64.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Map features `[n, F]` to outputs `[n, outputs]` in float64."""
        return features.double() @ self.weight.mT + self.bias

    def scaled(self, factor: float) -> LinearHead:
        """Return the head with its outputs scaled."""
        return LinearHead(self.weight * factor, self.bias * factor)

    def mixed(self, others: Sequence[LinearHead]) -> LinearHead:
        """Return the sum of this head and of what others for the same classes agree on, both of norm 1.

        What the others agree on is the sum of the others, each of norm 1.
        """
        return summed([self.of_unit_norm(), summed([other.of_unit_norm() for other in others]).of_unit_norm()])

    def of_unit_norm(self) -> LinearHead:
        """Return a head with the same differences between classes, up to a factor, and weights of norm 1."""
        weight, bias = self.weight - self.weight.mean(0), self.bias - self.bias.mean()
        return LinearHead(weight, bias).scaled(1 / max(float(weight.norm()), 1e-12))


def summed(heads: Sequence[LinearHead]) -> LinearHead:
    """Return the head whose outputs are the sums of the heads' outputs."""
    weights, biases = zip(*((head.weight, head.bias) for head in heads))
    return LinearHead(torch.stack(weights).sum(0), torch.stack(biases).sum(0))


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
    """`μ_cᵀ Σ⁻¹ φ − ½ μ_cᵀ Σ⁻¹ μ_c` without what all classes share, Σ the shrunk covariance within classes.

    A class that no example has gets the least output that another class has for any of the examples: it is never
    answered for them, and training can raise it.
    """
    moments = ClassMoments.of(x, y, classes)
    seen, weight, bias = moments.seen, x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    if not seen.any():
        return LinearHead(weight, bias)
    middle = moments.means[seen].mean(0)  # features may be far from zero, compared with what tells classes apart
    away = moments.means[seen] - middle
    weight[seen] = _solve(moments.factor, len(y) - int(seen.sum()), away)
    bias[seen] = -0.5 * (away * weight[seen]).sum(1) - weight[seen] @ middle
    bias[seen] -= bias[seen].mean()
    bias[~seen] = (x @ weight[seen].mT + bias[seen]).min()
    return LinearHead(weight, bias)


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
    moments, target, freedom = ClassMoments.of(x, torch.zeros(len(x), dtype=torch.long), 1), y.mean(0), len(x) - 1
    middle = moments.means[0]
    weight = _solve(moments.factor, freedom, (y - target).mT @ (x - middle) / max(1, freedom))
    return LinearHead(weight, target - weight @ middle)


def _solve(factor: Tensor, freedom: int, right: Tensor) -> Tensor:
    """Return `right Σ⁻¹`, `Σ = (1−ρ) S/m + ρ tr(S/m)/F I` with `S = factorᵀ factor`; the identity where S is zero.

    Where the factor has fewer rows than features only their products with each other are needed (Woodbury).

    Args:
        factor: `[r, F]`.
        freedom: m.
        right: `[k, F]`.
    """
    few, size = len(factor) < factor.shape[1], factor.shape[1]
    gram = factor @ factor.mT if few else factor.mT @ factor
    trace = float(gram.trace()) / max(freedom, 1)
    if freedom <= 0 or trace <= 0:
        return right
    shrinkage = oas_shrinkage(size, freedom, trace, float(gram.square().sum()) / freedom**2)
    ridge, scale = shrinkage * trace / size, (1 - shrinkage) / freedom
    inner = ridge * torch.eye(len(gram), dtype=torch.float64) + scale * gram
    if not few:
        return torch.linalg.solve(inner, right.mT).mT
    return (right - scale * torch.linalg.solve(inner, factor @ right.mT).mT @ factor) / ridge


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of a task's examples, and labels as `qtuning_fast.method.labels` has them.

    Attributes:
        features: `[n, F]`.
        labels: of the n examples.
    """

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, chosen: Tensor) -> LabelledFeatures:
        """Return some of the examples."""
        return LabelledFeatures(self.features[chosen], self.labels[chosen])

    def beside(self, others: LabelledFeatures) -> LabelledFeatures:
        """Return these examples and others."""
        return LabelledFeatures(torch.cat([self.features, others.features]), torch.cat([self.labels, others.labels]))


HeadMaker = Callable[[LabelledFeatures], LinearHead]


def judged_head(
    make: HeadMaker, examples: LabelledFeatures, validation: LabelledFeatures | None, problem_type: str = SINGLE
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
    made_and_judged = [] if validation is None else [(head, examples, validation)]
    place = _places(examples, problem_type)
    for fold in place.unique().tolist() if int(place.max()) else ():
        rest = examples.rows(place != fold)
        made_and_judged.append((make(rest), rest, examples.rows(place == fold)))
    judged = [(made, _fair(seen, some, problem_type)) for made, seen, some in made_and_judged]
    if not sum(len(some) for _, some in judged):
        return head, torch.zeros(0, dtype=torch.float64)
    outputs = torch.cat([made(some.features) for made, some in judged])
    labels = torch.cat([some.labels for _, some in judged])
    temperature = _temperature(outputs, labels, problem_type)
    scaled = head if problem_type == REGRESSION else head.scaled(1 / temperature)
    return scaled, example_losses(outputs / temperature, labels, problem_type)


def mixed_head(
    trained: LinearHead, examples: LabelledFeatures, validation: LabelledFeatures, outputs: int
) -> LinearHead:
    """Return a trained head of classes mixed with the closed form of all examples, both of norm 1.

    Training has seen the examples, and the validation examples have only chosen when it stops; the closed form learns
    from both. The sum is scaled by the temperature at which the validation examples have the least loss, each judged by
    a closed form that is made without it.

    Args:
        trained: the head as training left it.
        examples, validation: those that it was trained and chosen by.
        outputs: number of classes.
    """

    def mixed(some: LabelledFeatures) -> LinearHead:
        return summed([trained.of_unit_norm(), closed_form_head(some.features, some.labels, outputs).of_unit_norm()])

    place, judged = _places(validation, SINGLE), list[tuple[Tensor, Tensor]]()
    for fold in place.unique().tolist():
        seen = examples.beside(validation.rows(place != fold))
        some = _fair(seen, validation.rows(place == fold), SINGLE)
        judged.append((mixed(seen)(some.features), some.labels))
    head = mixed(examples.beside(validation))
    found, labels = (torch.cat(parts) for parts in zip(*judged))
    return head.scaled(max(1 / _temperature(found, labels, SINGLE), _LEAST_SCALE)) if len(labels) else head


def _fair(seen: LabelledFeatures, some: LabelledFeatures, problem_type: str) -> LabelledFeatures:
    """Return the examples by which a head made from those seen may be judged: those of classes that it was shown."""
    if problem_type != SINGLE:
        return some
    labels = some.labels.reshape(-1).long()
    fair = (labels != IGNORED) & torch.isin(labels, seen.labels.reshape(-1).long())
    return LabelledFeatures(some.features[fair], labels[fair])


def _places(examples: LabelledFeatures, problem_type: str) -> Tensor:
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
