"""Flash attention on an NVIDIA GPU by PyTorch's own operators.

Their conventions, from the sources of PyTorch 2.11 to 2.13:

- Without dropout, their backward passes require tensors for the state of the random generator but do not read them.
- They load 16 bytes at a time. Data must start, and rows must lie, on multiples of 16 bytes; otherwise it is copied.
- FlashAttention-2 and the memory-efficient kernels follow PyTorch's deterministic mode; cuDNN has no such mode.

On ROCm these operators run other kernels, whose log-sum-exp is not known to be natural, so all of them refuse there.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import constant
from qtuning_fast.attention.composed.vendors.base import (
    FEW_QUERIES,
    Attention,
    Vendor,
    cut,
    folding,
    of_one_head_size,
    padded,
)

HALVES = (torch.float16, torch.bfloat16)
LARGEST_GRID = 65535  # blocks in the grid dimensions of batch and heads
NO_MASK, BOTTOM_RIGHT = 0, 2  # custom_mask_type of the memory-efficient kernels; 1 is top-left
LSE_ROWS = 32  # they pad the log-sum-exp to a multiple of this

aten = torch.ops.aten


@constant
def capability(index: int | None) -> tuple[int, int]:
    """Return the compute capability of a device. Tests replace this function."""
    return torch.cuda.get_device_capability(index)


@constant
def cudnn_version() -> int:
    """Return cuDNN's version, such as 91501 for 9.15.1; 0 without cuDNN. Tests replace this function."""
    return torch.backends.cudnn.version() or 0


@constant
def other_flash_attention() -> str | None:
    """Return the name of an implementation that a user activated instead of PyTorch's FlashAttention-2, or None."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current() if current else None


@constant
def switched_on(name: str) -> bool:
    """Return the state of a PyTorch switch that `torch.backends.cuda.enable_flash_sdp` or `sdpa_kernel` sets."""
    return bool(getattr(torch.backends.cuda, f"{name}_sdp_enabled")())


@constant
def _avoids_recompilation() -> bool:
    return os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1"


def common_obstacle(call: PrefixAttentionCall, dtypes: tuple[torch.dtype, ...], *, windows: bool = False) -> str | None:
    """Return why a vendor on a GPU that may take windows cannot compute a call, whichever it is, or None."""
    query, value = call.query, call.value
    if not query.is_cuda:
        return f"it is for CUDA devices, and query is on {query.device}"
    if torch.version.hip is not None:
        return "on ROCm its log-sum-exp is not known to be natural"
    if call.is_packed:
        return "it is not given packed sequences"
    if in_windows(call):
        if not windows:
            return "it is not given windows"
        if query.shape[2] > call.key.shape[2]:
            return "it is given windows only where there are as many keys as queries, so that each query sees its own"
    if query.dtype not in dtypes:
        return f"it takes {', '.join(str(dtype) for dtype in dtypes)}, and query is {query.dtype}"
    if max(query.shape[0], query.shape[1]) > LARGEST_GRID:
        return f"it takes up to {LARGEST_GRID} samples and heads, got {tuple(query.shape[:2])}"
    if max(query.shape[-1], value.shape[-1]) > 256:
        return f"it takes head sizes up to 256, got {query.shape[-1]} and {value.shape[-1]}"
    return None


def _mask_obstacle(call: PrefixAttentionCall) -> str | None:
    """Return why query's dtype cannot hold the mask, or None: -1e9, for example, would be -inf in float16."""
    dtype = call.query.dtype
    for mask in (call.padding_mask, call.attn_mask):
        if mask is not None and mask.is_floating_point() and torch.promote_types(mask.dtype, dtype) != dtype:
            return f"it adds masks in query's dtype, {dtype}, which does not hold all values of {mask.dtype}"
    return None


def in_windows(call: PrefixAttentionCall) -> bool:
    """Return whether queries see windows; the window of one query is a cut of the keys."""
    return call.query.shape[2] > 1 and (call.keys_before is not None or call.keys_after not in (None, 0))


def has_mask(call: PrefixAttentionCall) -> bool:
    return call.attn_mask is not None or call.padding_mask is not None


def aligned(x: Tensor) -> Tensor:
    """Copy x unless its last dimension is dense, nothing overlaps, and start and strides are multiples of 16 bytes."""
    whole = 16 // x.element_size()
    fits = x.stride(-1) == 1 and all(s % whole == 0 and (s or n == 1) for s, n in zip(x.stride()[:-1], x.shape))
    return x if fits and starts_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def dense(x: Tensor) -> Tensor:
    """Copy x unless it is contiguous and starts at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if starts_aligned(x) else x.clone()


def starts_aligned(x: Tensor) -> bool:
    """Return whether x starts at a multiple of 16 bytes. Tests, whose tensors may have no memory, replace it."""
    return x.data_ptr() % 16 == 0


def by_position(x: Tensor) -> Tensor:
    """Transpose [B, H, N, D] to [B, N, H, D], or back."""
    return x.transpose(1, 2)


# ---- cuDNN ----------------------------------------------------------------------------------------------------------


def _cudnn_why_not(call: PrefixAttentionCall) -> str | None:
    obstacle = common_obstacle(call, HALVES) or _mask_obstacle(call)
    if obstacle is not None:
        return obstacle
    if not switched_on("cudnn"):
        return "it is switched off in torch.backends.cuda"
    N, M = call.query.shape[2], call.key.shape[2]
    largest = max(call.query.shape[-1], call.value.shape[-1])
    if torch.are_deterministic_algorithms_enabled():
        return "it is not deterministic"
    if capability(call.query.device.index) not in ((9, 0), (10, 0), (10, 3)) or cudnn_version() <= 91500:
        return "PyTorch itself prefers it only from cuDNN 9.15.1, on compute capabilities 9.0, 10.0 and 10.3"
    if _avoids_recompilation():
        return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE changes its layouts"
    if largest > 128:
        return f"it takes head sizes up to 128, got {largest}"
    if N == 1 or M == 1:
        return "it takes neither one query nor one key"
    if call.keys_after == 0 and N < M:
        return f"its causality is top-left, and N, M are {N}, {M}"
    if call.keys_after == 0 and has_mask(call):
        return "it takes causality or a mask, not both"
    if call.padding_mask is not None:
        return "the padding mask would have to be expanded for every query"
    if call.keys_after != 0 and M % 128 == 64:
        # It treats the empty half of its last tile of keys as scores of 0: exp(0 - L) overflows if L < -88.7.
        return f"its backward pass can return NaN if M is 64 more than a multiple of 128, and M is {M}"
    return None


def _cudnn_inputs(x: Attention) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v = (aligned(y) for y in of_one_head_size(x, 8))
    if x.mask is None:
        return q, k, v, None
    B, _, N, _ = q.shape
    return q, k, v, _bias(x.mask.expand(B, -1, N, k.shape[2]), q.dtype)


def _cudnn_forward(x: Attention) -> tuple[Tensor, Tensor]:
    q, k, v, bias = _cudnn_inputs(x)
    output, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, bias, True, 0.0, x.is_causal, False, scale=x.scale
    )
    return output[..., : x.value.shape[-1]], lse.reshape(q.shape[:3])


def _cudnn_backward(x: Attention, output: Tensor, lse: Tensor, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, bias = _cudnn_inputs(x)
    # Some versions look up a plan by query, key, value and bias alone, so all other tensors need a fixed layout.
    o, d_o = (_as_in_forward(padded(y, q.shape[-1]), q) for y in (output, d_output))
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        d_o, q, k, v, o, dense(lse).unsqueeze(-1), seed, seed, bias, None, None,
        q.shape[2], k.shape[2], 0.0, x.is_causal, scale=x.scale,
    )  # fmt: skip
    return cut(x, *gradients)


def _as_in_forward(x: Tensor, query: Tensor) -> Tensor:
    """Return x [B, H, N, D] in the memory order of the forward pass's output."""
    room = torch.empty_like(query)
    return x if x.stride() == room.stride() and starts_aligned(x) else room.copy_(x)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a mask [b, h, n, M] so that each row starts at a multiple of 16 bytes."""
    M = mask.shape[-1]
    return aligned(padded(mask.to(dtype), M + -M % 8))[..., :M]


CUDNN = Vendor("cuDNN", _cudnn_why_not, _cudnn_forward, _cudnn_backward, bottom_right=False, keeps_layout=True)


# ---- FlashAttention-2 -----------------------------------------------------------------------------------------------


def _flash_2_why_not(call: PrefixAttentionCall) -> str | None:
    obstacle = common_obstacle(call, HALVES, windows=True)
    if obstacle is not None:
        return obstacle
    if not switched_on("flash"):
        return "it is switched off in torch.backends.cuda"
    if has_mask(call):
        return "it takes no masks"
    found = capability(call.query.device.index)
    if not (8, 0) <= found <= (12, 1):
        return f"it needs a compute capability from 8.0 to 12.1, got {found[0]}.{found[1]}"
    largest = max(call.query.shape[-1], call.value.shape[-1])
    if 192 < largest <= 224 and ((8, 6) <= found <= (8, 9) or found >= (12, 0)):
        return f"its backward pass does not take head size {largest} on compute capability {found[0]}.{found[1]}"
    other = other_flash_attention()
    return None if other is None else f"{other} was activated in its place"


def _flash_2_forward(x: Attention) -> tuple[Tensor, Tensor]:
    q, k, v = (by_position(aligned(y)) for y in of_one_head_size(x, 8))
    output, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, x.is_causal, False, scale=x.scale, **_window(x)
    )
    return by_position(output)[..., : x.value.shape[-1]], lse


def _flash_2_backward(x: Attention, output: Tensor, lse: Tensor, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (by_position(aligned(y)) for y in of_one_head_size(x, 8))
    o, d_o = (dense(by_position(padded(y, q.shape[-1]))) for y in (output, d_output))
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    gradients = aten._flash_attention_backward(
        d_o, q, k, v, o, dense(lse), None, None, q.shape[1], k.shape[1], 0.0, x.is_causal, state, state,
        scale=x.scale, **_window(x),
    )  # fmt: skip
    return cut(x, *(by_position(d) for d in gradients))


def _window(x: Attention) -> dict[str, int | None]:
    left, right = x.window
    return {"window_size_left": left, "window_size_right": right}


FLASH_2 = Vendor(
    "PyTorch's FlashAttention-2",
    _flash_2_why_not,
    *folding(_flash_2_forward, _flash_2_backward, FEW_QUERIES),  # with more queries it handles groups as well by itself
    bottom_right=True,
    keeps_layout=True,
    windows=True,
)


# ---- memory-efficient attention -------------------------------------------------------------------------------------


def _efficient_why_not(call: PrefixAttentionCall) -> str | None:
    obstacle = common_obstacle(call, (*HALVES, torch.float32)) or _mask_obstacle(call)
    if obstacle is not None:
        return obstacle
    if not switched_on("mem_efficient"):
        return "it is switched off in torch.backends.cuda"
    found = capability(call.query.device.index)
    if not (5, 0) <= found <= (12, 1):
        return f"it needs a compute capability from 5.0 to 12.1, got {found[0]}.{found[1]}"
    if call.query.dtype == torch.bfloat16 and found < (8, 0):
        return "it takes bfloat16 from compute capability 8.0"
    return None


def _efficient_inputs(x: Attention) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return query, key and value as [B, N, H, D], keys and values repeated for the heads of a group, and the bias."""
    B, Hq, N, _ = x.query.shape
    M = x.key.shape[2]
    q, k, v = (padded(y, y.shape[-1] + -y.shape[-1] % 8) for y in x[:3])
    if Hq != k.shape[1]:
        k, v = (y.repeat_interleave(Hq // y.shape[1], dim=1) for y in (k, v))
    q, k, v = (by_position(aligned(y)) for y in (q, k, v))
    if x.mask is None:
        return q, k, v, None
    b, h, n, _ = x.mask.shape
    return q, k, v, _bias(x.mask.expand(b, h, n, M), q.dtype).expand(B, Hq, N, M)


def _efficient_forward(x: Attention) -> tuple[Tensor, Tensor]:
    q, k, v, bias = _efficient_inputs(x)
    mask_type = BOTTOM_RIGHT if x.is_causal else NO_MASK
    output, lse, *_ = aten._efficient_attention_forward(
        q, k, v, bias, None, None, None, None, 0.0, mask_type, True, scale=x.scale
    )
    return by_position(output)[..., : x.value.shape[-1]], lse[..., : q.shape[1]]


def _efficient_backward(x: Attention, output: Tensor, lse: Tensor, d_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, bias = _efficient_inputs(x)
    N, M = q.shape[1], k.shape[1]
    o, d_o = (dense(by_position(padded(y, v.shape[-1]))) for y in (output, d_output))
    lse = torch.nn.functional.pad(lse, (0, -N % LSE_ROWS), value=torch.inf)  # exp(s - lse) is 0 there
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    mask_type = BOTTOM_RIGHT if x.is_causal else NO_MASK
    dq, dk, dv, _ = aten._efficient_attention_backward(
        d_o, q, k, v, bias, o, None, None, N, M, dense(lse), 0.0, seed, seed, mask_type, False,
        scale=x.scale,
    )  # fmt: skip
    dq, dk, dv = (by_position(d) for d in (dq, dk, dv))
    Hkv = x.key.shape[1]
    if dk.shape[1] != Hkv:
        dk, dv = (d.unflatten(1, (Hkv, -1)).sum(2) for d in (dk, dv))
    return cut(x, dq, dk, dv)


EFFICIENT = Vendor(
    "PyTorch's memory-efficient attention",
    _efficient_why_not,
    *folding(_efficient_forward, _efficient_backward),
    bottom_right=True,
    keeps_layout=False,
)
