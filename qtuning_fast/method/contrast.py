"""The contrastive regulariser of HiDe-Prompt: features under a new prompt keep away from those of earlier classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.8


def contrastive_loss(features: Tensor, means: Tensor) -> Tensor:
    """Return `−mean_i log(exp(m_i·m_i/τ) / Σ_j exp(m_i·m_j/τ))` over the rows m of means and features together.

    Each row is alike to itself alone: examples of a batch move apart, and away from the classes of earlier tasks
    (Wang et al. 2023, arXiv 2310.07234, the contrastive regularisation of within-task prediction; τ = 0.8).

    Args:
        features: `[B, F]` under the prompt in training.
        means: `[K, F]`, the class means of earlier tasks, each under its own prompt; K may be 0. They get no gradient.

    Returns:
        A scalar.
    """
    rows = torch.cat([means.detach().to(features), features])
    return F.cross_entropy(rows @ rows.mT / TEMPERATURE, torch.arange(len(rows), device=rows.device))
