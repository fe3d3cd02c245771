"""The residual MLP through which prompts train."""

from __future__ import annotations

from torch import Tensor, nn


class ResidualReparameterization(nn.Module):
    """`rows + MLP(rows)`, shared by all layers while a task trains and folded into the rows afterwards.

    The form follows Razdaibiedina et al., "Residual Prompt Tuning" (ACL Findings 2023). The last layer starts at zero,
    so that a prompt is unchanged at first.

    Args:
        features: length `F` of a row; the hidden layer has half as many units.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        hidden = max(1, features // 2)
        self.down = nn.Linear(features, hidden)
        self.up = nn.Linear(hidden, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows `[..., F]` to rows `[..., F]`."""
        return rows + self.up(nn.functional.relu(self.down(rows)))
