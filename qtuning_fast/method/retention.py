"""Memory retention: a Jensen-Shannon estimate of the information that new features keep about old ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RetentionPairs:
    """What a part of a batch is compared with, where processes split the batch.

    Attributes:
        joint: `[b, features]`, of the part's own samples under the previous task's adapter.
        product: `[b, features]`, of other samples of the whole batch.
        share: the part's share of the batch.
    """

    joint: Tensor
    product: Tensor
    share: float

    @classmethod
    def of(cls, z_old: Tensor, part: slice, shift: int) -> RetentionPairs:
        """Return those of a part, given the features `[B, features]` of the whole batch and how far they roll."""
        return cls(z_old[part], z_old.roll(shift, 0)[part], len(z_old[part]) / len(z_old))


class Discriminator(nn.Module):
    """The discriminator `F_ω`: it scores a pair of feature vectors (Q-tuning, arXiv 2404.14607, memory retention).

    Args:
        features: length of each vector.
        hidden: width of the hidden layer.
    """

    def __init__(self, features: int, hidden: int = 128) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(2 * features, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, z_new: Tensor, z_old: Tensor) -> Tensor:
        """Map two `[B, features]` to scores `[B]`."""
        pair = torch.cat([z_new, z_old], dim=-1)
        return self.score(pair.to(next(self.parameters()).dtype)).squeeze(-1)


def retention_loss(discriminator: Discriminator, z_new: Tensor, z_old: Tensor, shift: int) -> Tensor:
    """Return `L_MR = −I(z_new, z_old)` by the Jensen-Shannon estimator (Hjelm et al., ICLR 2019).

    Args:
        z_new: `[B, features]` under the shared prompt alone.
        z_old: `[B, features]` under the previous task's adapter; it gets no gradient.
        shift: an integer in 1..B-1; rolling `z_old` by it makes the product pairs.

    Returns:
        A scalar; `2 ln 2` if the discriminator is zero everywhere.
    """
    if not 1 <= shift < len(z_new):
        raise ValueError(f"shift is {shift}; it must be in 1..{len(z_new) - 1}, below the batch size")
    return pairs_loss(discriminator, z_new, RetentionPairs.of(z_old, slice(None), shift))


def pairs_loss(discriminator: Discriminator, z_new: Tensor, pairs: RetentionPairs) -> Tensor:
    """Return the loss of a part of a batch; the whole batch's is the mean over its parts, weighted by their shares."""
    joint = discriminator(z_new, pairs.joint.detach().to(z_new))
    product = discriminator(z_new, pairs.product.detach().to(z_new))
    return F.softplus(-joint).mean() + F.softplus(product).mean()
