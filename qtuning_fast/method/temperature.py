"""The temperature at which the softmax of scores has the least log-loss (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 18  # scores that are weighed at once; with what is made of them they stay in a processor's cache


def best_temperature(scores: Tensor, labels: Tensor) -> float:
    """Return the temperature T > 0 at which `softmax(scores / T)` has the least log-loss.

    Where classes are told apart without an error, the loss falls for ever as T falls. So T falls only until the loss is
    what n right answers warrant by Laplace's rule of succession, `log((n + 2) / (n + 1))`.

    Args:
        scores: `[n, C]` float64; −inf excludes a class. An example whose right class is excluded does not count, since
            no temperature helps it.
        labels: the right classes, `[n]`.
    """
    own = scores.gather(1, labels[:, None])
    counts = ~own[:, 0].isneginf()
    if not counts.all():
        scores, own, labels = scores[counts], own[counts], labels[counts]
    rows = max(1, _BLOCK // scores.shape[1])
    blocks = [_Gaps.of(some - right) for some, right in zip(scores.split(rows), own.split(rows))]
    others = sum(int(block.finite.count_nonzero()) for block in blocks)
    if not others:  # one class, or all scores alike
        return 1.0
    warranted = math.log((len(labels) + 2) / (len(labels) + 1))

    def loss(log_beta: float) -> tuple[float, float, float]:
        """The loss, and its first two derivatives by the inverse temperature, β, times β and β²."""
        beta = math.exp(log_beta)
        sums = torch.stack([block.sums(beta) for block in blocks]).sum(0) / len(labels)
        value, first, second = sums.tolist()
        return value, beta * first, beta**2 * second

    start = -math.log(sum(float(block.finite.abs().sum()) for block in blocks) / others)

    def beyond(log_beta: float) -> tuple[float, float]:
        """How far β is beyond the least loss or the warranted one, whichever comes first, and its derivative."""
        value, first, second = loss(log_beta)
        unit = math.exp(start - log_beta)  # the derivative by β, which rises with β, whatever unit scores have
        least = unit * first, unit * second
        # Of the logarithm, because a small loss falls exponentially with β.
        right = (math.log(warranted / value), -first / value) if value > 0 else (1.0, 0.0)
        return max(least, right)

    return math.exp(-_root(beyond, start - 20, start + 20))


@dataclass(frozen=True)
class _Gaps:
    """By how much scores exceed that of the right class, of so few examples that a processor's cache holds them.

    Attributes:
        gaps: `[n, C]`; −inf excludes a class.
        finite: the same with 0 for −inf, since a probability of 0 times −inf is not 0.
        likeliest: the index of each example's largest gap, `[n, 1]`.
    """

    gaps: Tensor
    finite: Tensor
    likeliest: Tensor

    @classmethod
    def of(cls, gaps: Tensor) -> _Gaps:
        excluded = gaps.isneginf()
        finite = gaps.masked_fill(excluded, 0.0) if excluded.any() else gaps
        return cls(gaps, finite, gaps.argmax(1, keepdim=True))

    def sums(self, beta: float) -> Tensor:
        """Return the sums over the examples of the log-loss and of its first two derivatives by β, `[3]`."""
        probabilities = (beta * self.gaps).softmax(1)
        # The log-sum-exp from the largest term, which is at least 1/C; that of the right class may be 0.
        losses = beta * self.gaps.gather(1, self.likeliest) - probabilities.gather(1, self.likeliest).log()
        weighted = probabilities.mul_(self.finite)
        mean = weighted.sum(1)
        variance = weighted.mul_(self.finite).sum(1) - mean.square()
        return torch.stack([losses.sum(), mean.sum(), variance.clamp(min=0).sum()])


def _root(function: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
    """Return where an increasing function is zero, by Newton's method within bounds.

    Args:
        function: returns its value and its derivative.
    """
    at = (low + high) / 2
    for _ in range(80):
        value, slope = function(at)
        low, high = (at, high) if value < 0 else (low, at)
        newton = at - value / slope if slope > 0 else math.nan
        step = newton if low < newton < high else (low + high) / 2
        # At the root Newton's step ends on a bound, which is no reason to halve what is left of the other side.
        if min(abs(step - at), abs(newton - at)) <= 1e-15 * max(1.0, abs(at)):
            break
        at = step
    return at
