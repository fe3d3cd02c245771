"""The interface of a vendor, and helpers that several vendors need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from qtuning_fast.attention.arguments import PrefixAttentionCall

FEW_QUERIES = 8  # up to this many, as in decoding, reading keys and values dominates the time


class Attention(NamedTuple):
    """A vendor's input. Neither N nor M is 0."""

    query: Tensor  # [B, Hq, N, D]
    key: Tensor  # [B, Hkv, M, D]
    value: Tensor  # [B, Hkv, M, Dv]
    mask: Tensor | None  # additive, [B, Hq, N, M]; any dimension may be 1
    is_causal: bool  # only with N = M, or with M > N, aligned bottom-right
    scale: float
    window: tuple[int | None, int | None] = (None, None)  # keys before and after a query's position, with M >= N


Forward = Callable[[Attention], tuple[Tensor, Tensor]]  # output, natural log-sum-exp [B, Hq, N]
Backward = Callable[[Attention, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # of output, lse, d_output


@dataclass(frozen=True)
class Vendor:
    """One implementation of attention without a prefix."""

    name: str
    why_not: Callable[[PrefixAttentionCall], str | None]  # why it cannot compute a call; None: it can
    forward: Forward
    backward: Backward
    bottom_right: bool  # whether causality is right with M > N; otherwise it is used with N = M only
    keeps_layout: bool  # whether results keep the memory order of query, key and value; otherwise [B, N, H, D]
    windows: bool = False  # whether it takes a window; otherwise windows are cut into pieces


def padded(x: Tensor, columns: int) -> Tensor:
    """Pad x [..., D] with columns of zeros."""
    return x if x.shape[-1] == columns else F.pad(x, (0, columns - x.shape[-1]))


def of_one_head_size(x: Attention, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Pad query, key and value with columns of zeros to one head size, a multiple of `multiple`."""
    D = max(x.query.shape[-1], x.value.shape[-1])
    D += -D % multiple
    return padded(x.query, D), padded(x.key, D), padded(x.value, D)


def cut(x: Attention, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value without the padded columns."""
    dq, dk, dv = (d[..., : like.shape[-1]] for d, like in zip(gradients, x[:3]))
    return dq, dk, dv


def folding(forward: Forward, backward: Backward, most: int | None = None) -> tuple[Forward, Backward]:
    """Make both treat the heads of a group as further queries of their key head, for up to `most` queries if given."""

    def choose(x: Attention) -> Attention:
        return folded(x) if most is None or x.query.shape[2] <= most else x

    def folded_forward(x: Attention) -> tuple[Tensor, Tensor]:
        y = choose(x)
        o, lse = forward(y)
        return (o, lse) if y is x else (o.reshape(*x.query.shape[:3], -1), lse.reshape(x.query.shape[:3]))

    def folded_backward(x: Attention, o: Tensor, lse: Tensor, d_o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = choose(x)
        if y is x:
            return backward(x, o, lse, d_o)
        rows = y.query.shape[:3]
        dq, dk, dv = backward(y, o.reshape(*rows, -1), lse.reshape(rows), d_o.reshape(*rows, -1))
        return dq.reshape(x.query.shape), dk, dv

    return folded_forward, folded_backward


def folded(x: Attention) -> Attention:
    """Reshape queries to [B, Hkv, G N, D], so that a group reads its keys once and no key is repeated.

    Returns x itself without groups, under causality or a window, which depend on a query's position, or if the mask
    would have to be repeated for many queries.
    """
    B, Hq, N, D = x.query.shape
    Hkv, mask = x.key.shape[1], x.mask
    if Hq == Hkv or x.is_causal or x.window != (None, None):
        return x
    if mask is not None and mask.shape[1:3] != (1, 1):
        if mask.shape[1:3] != (Hq, N) and N > FEW_QUERIES:
            return x
        mask = mask.expand(-1, Hq, N, -1).reshape(mask.shape[0], Hkv, -1, mask.shape[3])
    return x._replace(query=x.query.reshape(B, Hkv, -1, D), mask=mask)
