"""The masks of a call as a vendor takes them: additive, in the scores' dtype, cut as queries and keys are.

Subtracting a number from all scores of a query does not change attention. The shift is the largest mask value that a
query sees, which keeps its log-sum-exp near its scores however far the mask's values are from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import masked, score_dtype

NEAR = 256.0  # additive masks up to this magnitude are not shifted


class Masks:
    """Padding mask and attention mask of a call.

    Attributes:
        additive: those that there are, in this order: [B, Hq, N, M], any dimension may be 1; -inf hides a key.
        hide: whether each hides keys; on an accelerator, which would have to be waited for, whether it may.
        move: whether their numbers lie far from 0; likewise.
    """

    def __init__(self, call: PrefixAttentionCall) -> None:
        padding = None if call.padding_mask is None else call.padding_mask[:, None, None, :]
        given = [_narrowed(mask) for mask in (padding, call.attn_mask) if mask is not None]
        self.additive = [_additive(mask, score_dtype(call.query)) for mask in given]
        some = 0 not in call.query.shape
        self.move = some and any(
            mask.dtype != torch.bool and not (mask.is_cpu and _is_near(additive))
            for mask, additive in zip(given, self.additive)
        )
        self.hide = [not (mask.is_cpu and not mask.isneginf().any()) for mask in self.additive]


def shift_of(mask: Tensor) -> Tensor:
    """Return the shift of each row of an additive mask, 0 where its largest number is near 0 anyway."""
    largest = mask.amax(-1, keepdim=True)
    return largest.masked_fill(largest.isinf() | (largest.abs() <= NEAR), 0)


def under_causality(mask: Tensor, N: int, M: int) -> Tensor:
    """Return an additive mask with -inf where causality hides a key.

    Under causality queries see different keys, so a row shared by all queries is expanded to one row a query.
    """
    if mask.shape[3] != M:
        return mask
    return mask.masked_fill(torch.ones(N, M, dtype=torch.bool, device=mask.device).triu(M - N + 1), -torch.inf)


def _narrowed(mask: Tensor) -> Tensor:
    """Undo expanded dimensions, which would be written out."""
    for dim, stride in enumerate(mask.stride()):
        mask = mask.narrow(dim, 0, 1) if stride == 0 and mask.shape[dim] else mask
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return masked(torch.zeros(mask.shape, dtype=dtype, device=mask.device), mask)


def _is_near(additive: Tensor) -> bool:
    """Return whether all numbers are near 0, except for those that hide a key."""
    return bool(((additive.abs() <= NEAR) | additive.isneginf()).all())
