"""Calls of attention without a prefix, and how a vendor's answers to them are checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast.attention import reference
from qtuning_fast.attention.api import call_of as checked_call
from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.composed import context
from qtuning_fast.attention.composed.vendors import CPU_FLASH, Vendor
from qtuning_fast.attention.composed.vendors.cuda import CUDNN, EFFICIENT

TAKING_MASKS = [CPU_FLASH, CUDNN, EFFICIENT]


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    padding: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
) -> PrefixAttentionCall:
    return checked_call(
        query,
        key,
        value,
        prefix_key=key.new_empty(key.shape[1], 0, key.shape[3]),
        prefix_value=value.new_empty(value.shape[1], 0, value.shape[3]),
        gate=None,
        attn_mask=mask,
        padding_mask=padding,
        is_causal=is_causal,
        window=window,
        scale=0.3,
    )


def fake_call(
    B=2,
    Hq=4,
    Hkv=2,
    N=16,
    M=16,
    D=64,
    Dv=None,
    dtype=torch.bfloat16,
    device="cuda",
    mask=None,
    padding=None,
    is_causal=False,
    window=None,
):
    """A call without data; `mask` and `padding` are the dtypes of masks."""
    return call_of(
        torch.empty(B, Hq, N, D, dtype=dtype, device=device),
        torch.empty(B, Hkv, M, D, dtype=dtype, device=device),
        torch.empty(B, Hkv, M, Dv or D, dtype=dtype, device=device),
        _fake_mask(mask, 1, 1, N, M, device=device),
        is_causal,
        _fake_mask(padding, B, M, device=device),
        window,
    )


def _fake_mask(dtype, *sizes, device):
    return None if dtype is None else torch.empty(sizes, dtype=dtype, device=device)


def scores_of(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    s = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if mask is not None:
        s = s + mask
    if is_causal:
        N, M = s.shape[-2:]
        s = s.masked_fill(~torch.ones(N, M, dtype=torch.bool, device=s.device).tril(M - N), -torch.inf)
    return s


def attend(q, k, v, mask, is_causal, scale):
    """Output and log-sum-exp; NaN for rows that see nothing, as the worst of vendors might report."""
    s = scores_of(q, k, mask, is_causal, scale)
    return s.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), s.logsumexp(-1)


def gradients(q, k, v, mask, is_causal, scale, o, lse, d_o):
    """The gradients of the part of a softmax that these keys are, given the whole one's output and log-sum-exp."""
    G = q.shape[1] // k.shape[1]
    p = (scores_of(q, k, mask, is_causal, scale) - lse[..., None]).exp()
    ds = p * (d_o @ v.repeat_interleave(G, 1).mT - (d_o * o).sum(-1, keepdim=True))
    dk, dv = (x.unflatten(1, (-1, G)).sum(2) for x in (scale * ds.mT @ q, p.mT @ d_o))
    return scale * ds @ k.repeat_interleave(G, 1), dk, dv


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x [B, H, N, D] lying otherwise in memory."""
    if layout == "by position":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":  # as one third of what a projection returns
        B, H, N, D = x.shape
        return x.new_zeros(B, N, 3, H, D).select(2, 1).copy_(x.transpose(1, 2)).transpose(1, 2)
    if layout == "unaligned":
        return x.new_zeros(x.numel() + 1).narrow(0, 1, x.numel()).view(x.shape).copy_(x)
    if layout == "by column":
        return x.mT.contiguous().mT
    if layout == "broadcast":
        return x[:1].expand(x.shape)
    return x


MASKS = {  # each as one of [B, Hq, N, M]
    "padding": (True, False, False),
    "by position": (False, False, True),
    "by head": (False, True, False),
    "whole": (True, True, True),
}


def real_call(
    B=2, Hq=4, Hkv=2, N=5, M=7, D=8, Dv=8, mask=None, is_bool=True, is_causal=False, layout="", dtype=torch.float64,
    device="cpu", window=None,
):  # fmt: skip
    """A call with data; with a mask, some query sees no key."""
    generator = torch.Generator().manual_seed(N * M + D)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    q, k, v = (laid_out(normal(*shape), layout) for shape in ((B, Hq, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv)))
    if mask is not None:
        shape = [n if whole else 1 for n, whole in zip((B, Hq, N), MASKS[mask])]
        visible = torch.rand(*shape, M, generator=generator) < 0.7
        visible[-1, -1, -1] = False
        values = torch.randn(visible.shape, generator=generator, dtype=torch.float64)
        mask = visible.to(device) if is_bool else values.masked_fill(~visible, -torch.inf).to(device, dtype)
    return call_of(q, k, v, mask, is_causal, window=window)


CASES = {
    "plain": {},
    "causal": {"N": 6, "M": 6, "is_causal": True},
    "bottom-right": {"N": 3, "is_causal": True},
    "more queries": {"N": 9, "M": 4, "is_causal": True},
    "no group": {"Hq": 2},
    "many queries": {"N": 37, "M": 40},
    "a whole block": {"N": 32},
    "one query": {"N": 1},
    "one query, one key": {"N": 1, "M": 1},
    "odd heads": {"D": 5, "Dv": 3},
    "wide values": {"D": 3, "Dv": 9},
    "by position": {"layout": "by position"},
    "packed": {"layout": "packed", "Hq": 2},
    "unaligned": {"layout": "unaligned"},
    "by column": {"layout": "by column"},
    "broadcast": {"layout": "broadcast"},
    "no samples": {"B": 0},
    "padding": {"mask": "padding"},
    "padding, one query": {"mask": "padding", "N": 1},
    "padding, many queries": {"mask": "padding", "N": 12, "M": 16},
    "by position mask": {"mask": "by position"},
    "by position mask, many queries": {"mask": "by position", "N": 12},
    "by head": {"mask": "by head", "N": 12},
    "whole": {"mask": "whole", "N": 12},
    "added": {"mask": "whole", "is_bool": False},
    "mask and causal": {"mask": "whole", "N": 7, "is_causal": True},
    "mask and bottom-right": {"mask": "padding", "N": 4, "is_causal": True},
    "mask and more queries": {"mask": "whole", "N": 11, "is_causal": True},
    "added and causal": {"mask": "padding", "is_bool": False, "N": 7, "is_causal": True},
    "added and bottom-right": {"mask": "by head", "is_bool": False, "N": 4, "is_causal": True},
    "added and more queries": {"mask": "padding", "is_bool": False, "N": 11, "is_causal": True},
    "window": {"N": 40, "M": 40, "window": (5, 3)},
    "window, causal": {"N": 20, "M": 33, "window": (6, None), "is_causal": True},
    "window, left": {"N": 12, "M": 12, "window": (4, None)},
    "window, right": {"N": 9, "M": 12, "window": (None, 2)},
    "window, few queries": {"N": 3, "M": 12, "window": (2, 0)},
}
FITTING = ["plain", "causal", "packed", "odd heads", "one query", "padding", "whole"]


def does(vendor: Vendor, call: PrefixAttentionCall) -> bool:
    """Whether it is for a vendor on some GPU, but for dtype and device."""
    N, M, mask = call.query.shape[2], call.key.shape[2], given_mask(call)
    if call.keys_before is not None or call.keys_after not in (None, 0):
        return vendor.windows or vendor is CPU_FLASH
    if vendor is CUDNN:
        return min(N, M) > 1 and not (call.is_causal and (N < M or mask is not None))
    return mask is None or vendor in TAKING_MASKS


def given_mask(call: PrefixAttentionCall) -> Tensor | None:
    return call.attn_mask if call.padding_mask is None else call.padding_mask


def additive(call: PrefixAttentionCall) -> Tensor | None:
    mask = given_mask(call)
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask.double() if mask.ndim == 4 else mask.double()[:, None, None]


def with_window(call: PrefixAttentionCall) -> Tensor | None:
    """The additive mask of a call, its window included."""
    reached, mask = reference.within_reach(call), additive(call)
    if reached is None or (call.keys_before is None and call.keys_after == 0):
        return mask
    return of_window(reached) if mask is None else mask + of_window(reached)


def of_window(reached: Tensor) -> Tensor:
    return torch.zeros(reached.shape, dtype=torch.float64, device=reached.device).masked_fill(~reached, -torch.inf)


def merged_with_more(o: Tensor, L: Tensor, seed: int = 3) -> None:
    """Made-up further keys merged in place into an output and its log-sum-exp; for some queries there are none."""
    generator = torch.Generator().manual_seed(seed)
    o_more, L_more = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(o.device) for x in (o, L))
    L_more[..., -1:] = -torch.inf
    total = torch.logaddexp(L.double(), L_more)
    finite = total.masked_fill(total.isneginf(), 0)
    w, w_more = ((x - finite).exp()[..., None] for x in (L.double(), L_more))
    o.copy_(o.double() * w + o_more * w_more)
    L.copy_(total)


def forward(call: PrefixAttentionCall, vendor: Vendor) -> tuple[Tensor, Tensor, Tensor]:
    """The context's output, log-sum-exp and rest."""
    return context.forward(call, vendor, keeps_rest=True)


def assert_right(vendor: Vendor, call: PrefixAttentionCall, tolerance: float, lse_tolerance: float) -> None:
    """Compares both passes, through `context`, with float64. A tolerance is a fraction of the largest value."""
    q, k, v = (x.double() for x in (call.query, call.key, call.value))
    options = (with_window(call), call.is_causal, call.scale)
    o_exact, L_exact = attend(q, k, v, *options)
    o_exact = o_exact.nan_to_num(0.0)

    o, L, rest = forward(call, vendor)
    rooms = context.empty_outputs(call, vendor, keeps_rest=True)
    assert [x.stride() for x in (o, L, rest)] == [x.stride() for x in rooms] and o.dtype == q.to(o.dtype).dtype
    assert_close(o, o_exact, tolerance)
    assert (L.isneginf() == L_exact.isneginf()).all()
    assert_close(L.nan_to_num(neginf=0.0), L_exact.nan_to_num(neginf=0.0), lse_tolerance)

    merged_with_more(o, L)
    rest.zero_()
    d_o = torch.randn(o.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(o)
    L_exact = L.double().masked_fill(L.isneginf(), torch.inf)
    exact = gradients(q, k, v, *options, o.double(), L_exact, d_o.double())
    found = context.backward(call, vendor, o, L, rest, d_o)
    for x, x_exact, room in zip(found, exact, context.empty_gradients(call, vendor)):
        assert x.stride() == room.stride() and x.dtype == room.dtype
        assert_close(x, x_exact, tolerance)


def assert_close(x: Tensor, exact: Tensor, tolerance: float) -> None:
    assert x.shape == exact.shape and not x.isnan().any()
    if x.numel():
        error, largest = (x.double() - exact).abs().max().item(), exact.abs().max().item()
        assert error <= tolerance * max(largest, 1e-3), f"{error} of {largest}"


def pairs(who: list[Vendor], cases: Iterable[str]) -> list[Any]:
    """Each vendor with each case that it does."""
    return [
        pytest.param(vendor, case, id=f"{vendor.name}, {case}")
        for vendor in who
        for case in cases
        if does(vendor, real_call(**CASES[case]))
    ]
