"""Vendors: flash attention by others, with its log-sum-exp and its backward pass, for the composed backend.

Their backward passes rebuild p = exp(s - L) and δ = rowsum(dO ∘ O) from the output and the log-sum-exp that they
receive. Given the *global* ones, they therefore return the exact gradients of a part of the keys.
"""

from __future__ import annotations

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.composed.vendors.base import FEW_QUERIES, Attention, Vendor
from qtuning_fast.attention.composed.vendors.cpu import CPU_FLASH
from qtuning_fast.attention.composed.vendors.cuda import CUDNN, EFFICIENT, FLASH_2
from qtuning_fast.attention.composed.vendors.packages import FLASH_3, FLASH_4

__all__ = ["EFFICIENT", "FEW_QUERIES", "VENDORS", "Attention", "Vendor", "vendor_for"]

VENDORS = (CPU_FLASH, FLASH_4, FLASH_3, CUDNN, FLASH_2, EFFICIENT)  # fastest first
FOR_DECODING = (FLASH_2,)  # tried before all others: it splits over keys, so that few queries keep a GPU busy


def vendor_for(call: PrefixAttentionCall) -> Vendor | dict[str, str]:
    """Return the fastest vendor that can compute a call; if none can, the obstacle of each by name.

    The order depends on N alone: VENDORS, preceded by FOR_DECODING, which are for GPUs, for up to FEW_QUERIES queries.
    """
    obstacles: dict[str, str] = {}
    few = call.query.is_cuda and call.query.shape[2] <= FEW_QUERIES  # on a CPU N stays free where a graph is traced
    for vendor in (*FOR_DECODING, *VENDORS) if few else VENDORS:
        why_not = vendor.why_not(call)
        if why_not is None:
            return vendor
        obstacles[vendor.name] = why_not
    return obstacles
