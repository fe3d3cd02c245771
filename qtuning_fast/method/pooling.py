"""Pooling of token features into one feature vector a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_pool(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Average over the tokens and scale to unit root mean square, so that heads see the same scale for every model.

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
        weights = (attention_mask != 0).to(hidden)[..., None]
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return _scaled(pooled)


def last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the last token that is not padding, on either side; arguments and result as in `mean_pool`."""
    hidden = hidden.float()
    if attention_mask is None:
        return _scaled(hidden[:, -1])
    places = torch.arange(hidden.shape[1], device=hidden.device)
    last = (places * (attention_mask != 0)).argmax(1)
    return _scaled(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])


def first_token(hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the first token, an image model's class token; arguments and result as in `mean_pool`."""
    return _scaled(hidden[:, 0].float())


def _scaled(pooled: Tensor) -> Tensor:
    return F.rms_norm(pooled, pooled.shape[-1:])
