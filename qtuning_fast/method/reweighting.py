"""Low-rank reweighting of a queue's rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Reweighting(nn.Module):
    """`W = U V` over rows of shape `[heads, n, width]` (Q-tuning, arXiv 2404.14607; rank 1 in the paper).

    `W` starts at the rows' scale, which is 1 unless an eviction has changed it. Components beyond the first start with
    `U` random and `V` zero, so that they differ from each other but change nothing yet.

    Args:
        scale: `[n]`, the initial weight of each row.
        heads, width: sizes of the rows.
        rank: R.

    Attributes:
        U: `[n, R]`; V: `[R, heads, width]`.
    """

    def __init__(self, scale: Tensor, heads: int, width: int, rank: int) -> None:
        super().__init__()
        U = torch.randn(len(scale), rank)
        U[:, 0] = scale
        V = torch.zeros(rank, heads, width)
        V[0] = 1
        self.U = nn.Parameter(U)
        self.V = nn.Parameter(V)

    def forward(self) -> Tensor:
        """Return `W` as `[heads, n, width]`."""
        return torch.einsum("nr,rhd->hnd", self.U, self.V)

    def behind(self, n_shared: int) -> tuple[Tensor, Tensor]:
        """Return U and V for rows that follow `n_shared` others, which are not reweighted."""
        return torch.cat([self.U.new_zeros(n_shared, self.U.shape[1]), self.U]), self.V
