"""NoRGa's non-linear residual gate on the attention to a prefix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtuning_fast.attention.arguments import PrefixArguments

GATE_PER = ("layer", "head")


class Gate(nn.Module):
    """The parameters of `g(s) = s + α·σ(τ·s)` (Le et al., NeurIPS 2024, arXiv 2405.14124, section 4).

    Args:
        activation: σ, one of the names that `prefix_attention` takes.
        num_heads: number of query heads, each with its own pair (α, τ); None: one pair for all heads.

    Attributes:
        alpha, tau: `[]` or `[num_heads]`, initially 1.
    """

    def __init__(self, activation: str, num_heads: int | None = None) -> None:
        super().__init__()
        shape = () if num_heads is None else (num_heads,)
        self.activation = activation
        self.alpha = nn.Parameter(torch.ones(shape))
        self.tau = nn.Parameter(torch.ones(shape))

    def arguments(self) -> PrefixArguments:
        """Return the gate as keyword arguments of `prefix_attention`."""
        return gate_arguments(self.activation, self.alpha, self.tau)

    def extra_repr(self) -> str:
        return f"{self.activation!r}, shape={tuple(self.alpha.shape)}"


NO_GATE: PrefixArguments = {"gate": None}


def gate_arguments(activation: str, alpha: Tensor, tau: Tensor) -> PrefixArguments:
    """Return σ, α and τ as keyword arguments of `prefix_attention`."""
    return {"gate": activation, "gate_alpha": alpha, "gate_tau": tau}
