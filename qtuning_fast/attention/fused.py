"""The backend "fused": Triton kernels over prefix and context.

The kernels are imported when first needed: importing triton takes a second, and most calls on a CPU do not use it.
"""

from __future__ import annotations

import os

import torch

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.custom_op import Passes, operator

LARGEST_HEAD_SIZE = 256


def why_not(call: PrefixAttentionCall) -> str | None:
    """Return why the kernels cannot compute a call, or None."""
    query = call.query
    if query.device.type == "cpu" and not _interpreted():
        return "its Triton kernels need a GPU, and query is on the CPU"
    if query.device.type not in ("cpu", "cuda"):
        return f"its Triton kernels run on CUDA and ROCm devices, and query is on {query.device}"
    if query.dtype == torch.float64:
        return "its Triton kernels compute in float32, and query is float64"
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return "Triton's interpreter cannot multiply bfloat16"
    largest = max(query.shape[-1], call.value.shape[-1])
    if largest > LARGEST_HEAD_SIZE:
        return f"its Triton kernels take head sizes up to {LARGEST_HEAD_SIZE}, got {largest}"
    return None


def only_by_name(call: PrefixAttentionCall) -> str | None:
    """Return why "auto" skips the kernels, or None."""
    return "Triton's interpreter, meant for tests, runs only when requested by name" if call.query.is_cpu else None


def _interpreted() -> bool:
    if "TRITON_INTERPRET" not in os.environ:  # true for most calls on a CPU, and importing triton takes a second
        return False
    from qtuning_fast.kernels.target import INTERPRETED

    return INTERPRETED


def _passes() -> Passes:
    from qtuning_fast.kernels import passes

    return passes


attend = operator("attention", _passes)
