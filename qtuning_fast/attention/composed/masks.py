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
        found = [_additive(mask, score_dtype(call.query)) for mask in given]
        self.additive = [mask for mask, _, _ in found]
        self.hide = [hides for _, hides, _ in found]
        self.move = 0 not in call.query.shape and any(moves for _, _, moves in found)


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


def _additive(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool, bool]:
    """Return an additive mask, whether it hides keys, and whether its numbers lie far from 0.

    A mask that is of this kind already is returned as it is, where its numbers can be looked at.
    """
    lowest, is_bool = torch.finfo(dtype).min, mask.dtype == torch.bool
    as_it_is = mask.is_cpu and mask.dtype == dtype and mask.numel() > 0
    if as_it_is:
        least, most = (x.item() for x in mask.aminmax())
        if least > lowest:  # so nothing is hidden, and nothing NaN
            return mask, False, max(-least, most) > NEAR
        as_it_is = least == -torch.inf and not bool((mask == lowest).any())
    if not as_it_is:
        mask = masked(torch.zeros(mask.shape, dtype=dtype, device=mask.device), mask)
    if not mask.is_cpu:
        return mask, True, not is_bool
    hidden = mask == -torch.inf
    is_near = bool(((mask >= -NEAR) | hidden).all()) and bool((mask <= NEAR).all())
    return mask, bool(hidden.any()), not is_near
