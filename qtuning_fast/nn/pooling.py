"""From token features to one feature vector a sample."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mean_pool(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean over the tokens, scaled to unit root mean square, so that heads see one scale whatever the model.

    Args:
        hidden: `[B, N, hidden]`.
        attention_mask: `[B, N]`, 0 for padding; None: no padding.

    Returns:
        `[B, hidden]` in float32; zeros for a sample that is all padding.
    """
    hidden = hidden.float()
    if attention_mask is None:
        pooled = hidden.mean(1)
    else:
        weights = attention_mask.to(hidden)[..., None]
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return F.rms_norm(pooled, pooled.shape[-1:])
