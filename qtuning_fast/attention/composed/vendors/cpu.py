"""Flash attention on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.composed.vendors.base import (
    FEW_QUERIES,
    Attention,
    Vendor,
    cut,
    folding,
    of_one_head_size,
    padded,
)

aten = torch.ops.aten


def _why_not(call: PrefixAttentionCall) -> str | None:
    return None if call.query.is_cpu else f"it is for the CPU, and query is on {call.query.device}"


def _forward(x: Attention) -> tuple[Tensor, Tensor]:
    q, k, v = of_one_head_size(x)
    output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, x.is_causal, attn_mask=x.mask, scale=x.scale
    )
    return output[..., : x.value.shape[-1]], lse


def _backward(x: Attention, output: Tensor, lse: Tensor, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute in float32 at least, because for 16-bit inputs PyTorch accumulates dk and dv in 16 bits."""
    wide = torch.promote_types(x.query.dtype, torch.float32)
    q, k, v = (y.to(wide) for y in of_one_head_size(x))
    output, d_output = (padded(y, v.shape[-1]).to(wide) for y in (output, d_output))
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_output, q, k, v, output, lse, 0.0, x.is_causal, attn_mask=x.mask, scale=x.scale
    )
    return cut(x, *(d.to(x.query.dtype) for d in gradients))


CPU_FLASH = Vendor(
    "PyTorch's flash attention for CPUs",
    _why_not,
    *folding(_forward, _backward, FEW_QUERIES),
    bottom_right=False,
    keeps_layout=False,
)
