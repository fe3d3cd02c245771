"""Attention without a gate: PyTorch's own, by each of its backends, and the package flash_attn.

On the concatenated prefix it is a lower bound: a gate costs what comes on top of it. Causality is bottom-right, by
`causal_lower_right`. PyTorch's `is_causal` is top-left, which on a concatenated prefix is another, smaller computation.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.utils.weak import WeakTensorKeyDictionary

from qtuning_fast.attention.reference import reached
from qtuning_fast.bench.eager import concatenated
from qtuning_fast.bench.shapes import PrefixAttentionCall

Attention = Callable[[PrefixAttentionCall, Tensor, Tensor], Tensor]  # of call, keys and values [B, Hkv, P + M, D]

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def attend(attention: Attention, call: PrefixAttentionCall) -> Tensor:
    """Reweights the prefix and puts it in front, then computes attention."""
    return attention(call, *concatenated(call))


def pytorch(call: PrefixAttentionCall, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's attention, by the backend that PyTorch takes."""
    mask = _mask(call)
    if call.keys_before is not None:
        if mask is not None:
            raise NotImplementedError("a window and a mask at once")
        N, M = call.query.shape[2], call.key.shape[2]
        mask = _windowed(N, M, key.shape[2] - M, call.keys_before, call.keys_after, call.query.device)
    elif call.is_causal:
        if mask is not None:
            raise NotImplementedError("bottom-right causality and a mask at once")
        mask = causal_lower_right(call.query.shape[2], key.shape[2])
    grouped = call.query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(call.query, key, value, attn_mask=mask, scale=call.scale, enable_gqa=grouped)


def pytorch_by(backend: str, call: PrefixAttentionCall, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's attention, by one of BACKENDS."""
    if backend == "cudnn" and call.is_causal and call.keys_before is None:
        raise NotImplementedError("cuDNN knows no bottom-right causality")
    with sdpa_kernel(BACKENDS[backend]):
        return pytorch(call, key, value)


def context_alone(backend: str | None, call: PrefixAttentionCall) -> Tensor:
    """Attention to the context alone, with square causality, which every backend has: the least cost of the context."""
    if _mask(call) is not None:
        raise NotImplementedError("meant for contexts without a mask")
    grouped = call.query.shape[1] != call.key.shape[1]
    with sdpa_kernel(BACKENDS[backend]) if backend else nullcontext():
        return F.scaled_dot_product_attention(
            call.query, call.key, call.value, is_causal=call.is_causal, scale=call.scale, enable_gqa=grouped
        )


def flash_attn(version: int, call: PrefixAttentionCall, key: Tensor, value: Tensor) -> Tensor:
    """The package flash_attn of that version, whose causality is bottom-right. (A window would hide the prefix.)"""
    if version == 3:
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func
    if _mask(call) is not None:
        raise NotImplementedError("flash_attn takes no mask")
    query, key, value = (x.transpose(1, 2) for x in (call.query, key, value))
    output = flash_attn_func(query, key, value, softmax_scale=call.scale, causal=call.is_causal)
    return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)


ATTENTIONS: dict[str, Attention] = {
    "sdpa": pytorch,
    **{f"sdpa-{name}": partial(pytorch_by, name) for name in BACKENDS},
    "flash-attn-2": partial(flash_attn, 2),
    "flash-attn-3": partial(flash_attn, 3),
}


@lru_cache(maxsize=1)  # as a model would make it once for all its layers
def _windowed(N: int, M: int, P: int, before: int | None, after: int | None, device: torch.device) -> Tensor:
    """The mask [N, P + M] of a window behind a prefix that all queries see."""
    return F.pad(reached(N, M, before, after, device), (P, 0), value=True)


_masks = WeakTensorKeyDictionary()


def _mask(call: PrefixAttentionCall) -> Tensor | None:
    """The call's mask with visible rows for the prefix; made once, as a model would for all its layers."""
    mask = call.attn_mask if call.padding_mask is None else call.padding_mask[:, None, None, :]
    if mask is None:
        return None
    given = call.attn_mask if call.padding_mask is None else call.padding_mask
    if given not in _masks:
        neutral = mask.new_full((*mask.shape[:-1], call.prefix_key.shape[-2]), mask.dtype == torch.bool)
        _masks[given] = torch.cat([neutral, mask], dim=-1)
    return _masks[given]
