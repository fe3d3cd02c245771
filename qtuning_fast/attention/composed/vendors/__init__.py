"""Flash attention by others, as the composed backend uses it: forward with its log-sum-exp, and a backward pass.

What makes them fit: their backward passes rebuild p = exp(s - L) and δ = rowsum(dO ∘ O) from the output and the
log-sum-exp that they are handed, so with the *global* ones they give the exact gradients of a part of the keys.
"""

from __future__ import annotations

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.composed.vendors.base import FEW_QUERIES, Attention, Vendor
from qtuning_fast.attention.composed.vendors.cpu import CPU_FLASH
from qtuning_fast.attention.composed.vendors.cuda import CUDNN, EFFICIENT, FLASH_2
from qtuning_fast.attention.composed.vendors.packages import FLASH_3, FLASH_4

__all__ = ["EFFICIENT", "FEW_QUERIES", "VENDORS", "Attention", "Vendor", "vendor_for"]

VENDORS = (CPU_FLASH, FLASH_4, FLASH_3, CUDNN, FLASH_2, EFFICIENT)  # the fastest first
FOR_DECODING = (FLASH_2,)  # before all others: it splits over keys, so that few queries keep a GPU busy


def vendor_for(call: PrefixAttentionCall) -> Vendor | dict[str, str]:
    """The fastest that can do a call; if none can, what keeps each of them.

    The order depends on N alone: VENDORS, and for a few queries FOR_DECODING before them.
    """
    obstacles: dict[str, str] = {}
    for vendor in (*FOR_DECODING, *VENDORS) if call.query.shape[2] <= FEW_QUERIES else VENDORS:
        why_not = vendor.why_not(call)
        if why_not is None:
            return vendor
        obstacles[vendor.name] = why_not
    return obstacles
