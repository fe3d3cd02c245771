"""Task-adaptive prediction (TAP): one head over the classes of all tasks, re-balanced after each task.

HiDe-Prompt, Wang et al. 2023, arXiv 2310.07234. Heads that were learned task by task do not compare: the newest ones
give the largest outputs. So the head trains once more on pseudo-features of all classes, as many of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qtuning_fast.method.class_gaussians import ClassGaussians
from qtuning_fast.method.closed_form import LinearHead


@dataclass(frozen=True)
class Rebalancing:
    """How a head is re-balanced: gradient descent with momentum, rates along a cosine from epoch to epoch.

    Attributes:
        epochs: of pseudo-features, each drawn anew.
        rate: the learning rate of the first epoch.
        drawn: pseudo-features of each class an epoch; a step takes as many, of all classes mixed.
        momentum, weight_decay: of the gradient descent.
    """

    epochs: int = 30
    rate: float = 0.005
    drawn: int = 120
    momentum: float = 0.9
    weight_decay: float = 5e-4


def rebalanced(
    head: LinearHead, gaussians: ClassGaussians, how: Rebalancing = Rebalancing(), *, seed: int = 0
) -> LinearHead:
    """Return a head over C classes after training on pseudo-features.

    Args:
        head: the head to start from.
        gaussians: those of all C classes.
        how: the settings.
        seed: of the draws.

    Raises:
        ValueError: a class of the Gaussians is not among the head's.
    """
    if int(gaussians.classes.max()) >= len(head.bias):
        raise ValueError(f"there is a Gaussian of class {int(gaussians.classes.max())}, but {len(head.bias)} outputs")
    weight, bias = (x.detach().double().clone().requires_grad_() for x in (head.weight, head.bias))
    optimizer = torch.optim.SGD([weight, bias], lr=how.rate, momentum=how.momentum, weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(how.epochs):
        for features, labels in _mixed(gaussians, how.drawn, generator):
            optimizer.zero_grad()
            F.cross_entropy(features @ weight.mT + bias, labels).backward()
            optimizer.step()
        schedule.step()
    return LinearHead(weight.detach(), bias.detach())


def _mixed(gaussians: ClassGaussians, drawn: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Return an epoch's pseudo-features in random order, in steps."""
    features, labels = gaussians.sample(drawn, generator)
    order = torch.randperm(len(labels), generator=generator)
    return list(zip(features[order].split(drawn), labels[order].split(drawn)))
