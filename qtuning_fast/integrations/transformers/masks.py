"""What a layer's mask says: which keys are padding, and how far a query sees.

transformers describes masks by functions of positions. Those of plain and of windowed attention are recognised, so that
no mask of queries x keys is built for them; any other is written out.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

WINDOW = torch.int16  # the dtype of a mask with a window


class Seen(NamedTuple):
    """What a query may see."""

    padding: Tensor | None  # bool [B, M]
    full: Tensor | None  # [B, 1 or H, N, M], bool or additive; it includes causality
    reach: int | None  # a window: the keys at a distance of up to so many; None: no window


def attention_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return transformers' mask for `seen`.

    - Only padding beside causality: a bool `[B, M]`, or None without padding.
    - A window beside them: integers `[B, W, 1, M]`, -1 where a key may be seen and 0 for padding, in which W is the
      number of keys from a query's own to the farthest that it sees; `[1, W, 1, 1]` without padding. It is a view of
      one row. The window travels in the mask's shape, because not every model tells its attention function of it, and
      some tell of another. (`generate` may make the mask beforehand; a model takes one of four dimensions for made.)
    - Anything else: a bool `[B, 1, N, M]`, which includes causality. So it is with a static cache, whose `M` is its
      capacity, not the number of keys written so far, and where code is traced.
    """
    up_to_date = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    end = kv_offset + kv_length
    fits = attention_mask is None or (attention_mask.ndim == 2 and attention_mask.shape[1] == end)
    if fits and not kwargs.get("use_vmap"):
        padding = None if attention_mask is None else attention_mask[:, kv_offset:].bool()
        is_causal = mask_function is causal_mask_function and up_to_date
        if (is_causal or mask_function is bidirectional_mask_function) and not kv_offset:
            return padding
        if up_to_date and not torch.compiler.is_compiling():
            count = _window(mask_function, kwargs.get("local_size"))
            if count is not None:
                if padding is None:
                    row = torch.full((1, 1, 1, 1), -1, dtype=WINDOW, device=kwargs.get("device"))
                else:
                    row = -padding[:, None, None].to(WINDOW)
                return row.expand(-1, count, -1, -1)
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        q_offset=q_offset,  # type: ignore[arg-type]
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        **kwargs,
    )
    return None if mask is None else mask.bool()


def seen(mask: Tensor | None, key: Tensor) -> Seen:
    """Read a mask of `attention_mask` for a layer with these keys `[B, Hkv, M, D]`."""
    if mask is None or mask.ndim == 2:
        return Seen(mask, None, None)
    if not has_window(mask):
        return Seen(None, mask, None)
    padding = None
    if mask.shape[3] == key.shape[2]:
        padding = padding_beside(mask).expand(key.shape[0], -1)
    return Seen(padding, None, int(mask.shape[1]) - 1)


def has_window(mask: Tensor) -> bool:
    """Return whether a mask of four dimensions is one with a window."""
    if mask.dtype != WINDOW or mask.shape[2] != 1:
        return False
    if torch.compiler.is_compiling() or not mask.is_cpu:
        return True
    return not bool((mask[:, :1] > 0).any())  # a mask of ones is somebody else's


def padding_beside(mask: Tensor) -> Tensor:
    """Return the padding, bool `[B, M]`, in a mask with a window, or `[1, 1]`: there is none."""
    return mask[:, 0, 0] != 0


def _window(mask_function: Any, size: int | None) -> int | None:
    """Return how many keys a mask function leaves on a side, a query's own included; None: it has no plain window."""
    if not size:
        return None
    if _alike(mask_function, sliding_window_causal_mask_function(size)):
        return size
    return size + 1 if _alike(mask_function, sliding_window_bidirectional_mask_function(size)) else None


def _alike(a: Any, b: Any) -> bool:
    """Return whether two functions have the same code and, in their closures, the same functions and numbers."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        return a.__code__ is b.__code__ and _alike(_closure(a), _closure(b))
    return a is b or (type(a) is type(b) is int and a == b)


def _closure(function: FunctionType) -> tuple[Any, ...]:
    return tuple(cell.cell_contents for cell in function.__closure__ or ())
