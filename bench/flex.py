"""Prefix attention by FlexAttention, with the gate as its `score_mod`, and stronger variants of it.

The gradients of alpha and tau, which `score_mod` captures, take one atomic addition for each score: a step that trains
them measures those additions. `peers.py` therefore has a variant with both frozen.

Reweighting, expanding and concatenating the prefix and merging are compiled together with the attention, so that the
compiler can fuse them. Block masks are built once and not timed. On a CPU, FlexAttention computes forward only.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

from qtuning_fast.bench.eager import concatenated, in_front, per_head, prefix_rows
from qtuning_fast.bench.shapes import PrefixAttentionCall

Kernel = Callable[..., Tensor]  # of a call and its block mask


def attend(kernel: Kernel, call: PrefixAttentionCall) -> Tensor:
    """Calls a compiled kernel with a block mask for prefix and context."""
    return compiled(kernel)(call, block_mask(call, call.prefix_key.shape[-2]))


def attend_merged(call: PrefixAttentionCall) -> Tensor:
    """FlexAttention over the context alone and products over the prefix, merged at the log-sum-exp."""
    return compiled(_merged)(call, block_mask(call, 0))


def gated(tanh: Callable[[Tensor], Tensor], options: dict[str, Any], call: PrefixAttentionCall, mask: Any) -> Tensor:
    key, value = concatenated(call)
    P, (alpha, tau) = call.prefix_key.shape[-2], _gate(call)
    index, bias, cap = call.prefix_index, call.attn_mask, call.softcap

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if call.gate is None:
            gated_score = score
        elif index is None:
            gated_score = score + alpha[h] * tanh(tau[h] * score)
        else:
            gated_score = score + alpha[index[b], h] * tanh(tau[index[b], h] * score)
        biased = score if bias is None else score + bias[0, h, q, torch.clamp(kv - P, min=0)]
        return torch.where(kv < P, gated_score, biased)

    grouped = call.query.shape[1] != key.shape[1]
    return flex_attention(
        call.query,
        key,
        value,
        score_mod=score_mod,
        block_mask=mask,
        scale=call.scale,
        enable_gqa=grouped,
        kernel_options=cast(Any, options or None),
    )


def _gate(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """alpha and tau by head, because FlexAttention passes no gradient to a scalar."""
    if call.gate is None:
        return call.query, call.query  # not used
    assert isinstance(call.alpha, Tensor) and isinstance(call.tau, Tensor)
    heads = call.query.shape[1]
    alpha, tau = (x if x.ndim else x.repeat(heads) for x in (call.alpha, call.tau))
    return alpha, tau


def exact(call: PrefixAttentionCall, mask: Any) -> Tensor:
    return gated(torch.tanh, {}, call, mask)


def approximate(call: PrefixAttentionCall, mask: Any) -> Tensor:
    return gated(tanh_approx, {}, call, mask)


def attend_approximate(call: PrefixAttentionCall) -> Tensor:
    """FlexAttention with the GPU's own tanh, which our kernels use in bfloat16."""
    if call.query.is_cuda:
        lower_to_ptx()  # here, for a compiler cannot compile a change of itself
    return attend(approximate, call)


def by_flash(call: PrefixAttentionCall, mask: Any) -> Tensor:
    return gated(torch.tanh, {"BACKEND": "FLASH"}, call, mask)


def attend_by_flash(call: PrefixAttentionCall) -> Tensor:
    """FlexAttention with its FlashAttention backend."""
    if find_spec("flash_attn") is None:  # compiling would take long and fail in the end
        raise ImportError("FlexAttention's FlashAttention backend needs the package flash_attn.cute")
    return attend(by_flash, call)


def merged(context: Callable[..., tuple[Tensor, Tensor]], call: PrefixAttentionCall, mask: Any) -> Tensor:
    """Merges the context, computed by `context` with a log-sum-exp [B, Hq, N], and the prefix, computed by products."""
    dtype, Hkv = call.query.dtype, call.key.shape[1]
    o_ctx, L_ctx = context(call, mask)
    key = prefix_rows(call, call.prefix_key, call.reweight_key)
    value = prefix_rows(call, call.prefix_value, call.reweight_value)
    of_prefix = "hpd" if call.prefix_index is None else "bhpd"
    query = call.query.unflatten(1, (Hkv, -1))  # [B, Hkv, G, N, D]
    s = torch.einsum(f"bhgnd,{of_prefix}->bhgnp", query, key).flatten(1, 2).float() * call.scale
    s = s + per_head(call, call.alpha) * torch.tanh(per_head(call, call.tau) * s)
    L = torch.logaddexp(L_ctx, s.logsumexp(dim=-1))
    p = torch.exp(s - L[..., None]).to(dtype).unflatten(1, (Hkv, -1))
    o_pre = torch.einsum(f"bhgnp,{of_prefix}->bhgnd", p, value).flatten(1, 2)
    return (o_ctx * torch.exp(L_ctx - L)[..., None] + o_pre).to(dtype)


def _context(call: PrefixAttentionCall, mask: Any) -> tuple[Tensor, Tensor]:
    bias = call.attn_mask

    def add_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return score if bias is None else score + bias[0, h, q, kv]

    output, aux = flex_attention(
        call.query,
        call.key,
        call.value,
        score_mod=None if bias is None else add_bias,
        block_mask=mask,
        scale=call.scale,
        enable_gqa=call.query.shape[1] != call.key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return output, aux.lse


def _merged(call: PrefixAttentionCall, mask: Any) -> Tensor:
    return merged(_context, call, mask)


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiles a function for fixed shapes; a graph break is an error."""
    return torch.compile(function, dynamic=False, fullgraph=True)


_padded_masks = WeakTensorKeyDictionary()


def block_mask(call: PrefixAttentionCall, P: int) -> Any:
    """The block mask for P rows that all queries see, in front of the context; None: everything is visible."""
    (B, _, N, _), M = call.query.shape, call.key.shape[2]
    if call.cu_seqlens_query is not None:
        return _mask_of_sequences(call, call.cu_seqlens_query, P)
    if call.padding_mask is None:
        before, after = call.keys_before, call.keys_after
        bounded = before is not None or after is not None
        return _mask_of_positions(N, M, P, before, after, str(call.query.device)) if bounded else None
    if call.padding_mask not in _padded_masks:
        visible = in_front(call.padding_mask.new_ones(1, 1, P, 1), call.padding_mask[:, None, :, None])[:, 0, :, 0]
        _padded_masks[call.padding_mask] = create_block_mask(
            lambda b, h, q, kv: visible[b, kv], B, None, N, P + M, device=str(call.query.device)
        )
    return _padded_masks[call.padding_mask]


@cache
def _mask_of_positions(N: int, M: int, P: int, before: int | None, after: int | None, device: str) -> Any:
    """The block mask of causality and window, built without all its scores at once."""

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        ahead = kv - P - (q + M - N)
        seen = kv >= P
        seen = seen if after is None else seen & (ahead <= after)
        seen = seen if before is None else seen & (ahead >= -before)
        return (kv < P) | seen

    return create_block_mask(visible, None, None, N, P + M, device=device)


def _mask_of_sequences(call: PrefixAttentionCall, offsets: Tensor, P: int) -> Any:
    """The block mask of packed sequences with one prefix and as many queries as keys."""
    if call.prefix_index is not None or call.is_causal or call.keys_before is not None:
        raise NotImplementedError("packed sequences with tasks, causality or windows are not written for FlexAttention")
    if offsets not in _padded_masks:
        N = call.query.shape[2]
        sequence = torch.bucketize(torch.arange(N, device=offsets.device), offsets[1:], right=True)

        def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (kv < P) | (sequence[q] == sequence[torch.clamp(kv - P, min=0)])

        _padded_masks[offsets] = create_block_mask(visible, None, None, N, P + N, device=str(offsets.device))
    return _padded_masks[offsets]


# tanh as one instruction of NVIDIA GPUs, which our kernels use too (`kernels/gate.py`). Uncompiled it is plain tanh.


@torch.library.custom_op("qtuning_fast_bench::tanh_approx", mutates_args=())
def _tanh_approx(x: Tensor) -> Tensor:
    return torch.tanh(x)


@_tanh_approx.register_fake
def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, d_output: Tensor) -> Tensor:
    (sigma,) = ctx.saved_tensors
    return d_output * (1 - sigma * sigma)


_tanh_approx.register_autograd(_backward, setup_context=_setup_context)


@_tanh_approx.register_vmap
def _vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
    return tanh_approx(x), in_dims[0]


def tanh_approx(x: Tensor) -> Tensor:
    """tanh(x); compiled for a GPU after `lower_to_ptx`, its relative error in float32 is below 2⁻¹¹."""
    return torch.ops.qtuning_fast_bench.tanh_approx(x)


@cache
def lower_to_ptx() -> None:
    """Makes PyTorch's compiler replace the operator by the instruction, through a private interface."""
    from torch._inductor.lowering import make_pointwise, register_lowering
    from torch._inductor.virtualized import ops

    tanh = partial(ops.inline_asm_elementwise, asm="tanh.approx.f32 $0, $1;", constraints="=f,f")

    @register_lowering(torch.ops.qtuning_fast_bench.tanh_approx, type_promotion_kind=None)
    def lower(x: Any) -> Any:
        return make_pointwise(tanh)(x)


ATTENDS: dict[str, Callable[[PrefixAttentionCall], Tensor]] = {
    "flex": partial(attend, exact),
    "flex-tanh-approx": attend_approximate,
    "flex-merged": attend_merged,
    "flex-flash": attend_by_flash,
}
