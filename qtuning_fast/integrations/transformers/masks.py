"""What a layer's mask says: which keys are padding, how far a query sees, and where packed sequences begin.

transformers describes masks by functions of positions. Those of plain and of windowed attention, and of packed rows
under them, are recognised, so that no mask of queries x keys is built for them; any other is written out.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.utils.import_utils import is_tracing

WINDOW = torch.int16  # the dtype of a mask with a window
PACKED = torch.uint32  # and of one of packed sequences, which nobody else takes for masks


class Packed(NamedTuple):
    """Sequences of packed rows, counted through all rows of a batch."""

    offsets: Tensor  # int32 [S + 1]
    longest: int | None  # of their tokens; None: not known


_packed_by_mask = WeakTensorKeyDictionary()  # so that layers need not look at a mask, for which an accelerator waits


class Seen(NamedTuple):
    """What a query may see."""

    padding: Tensor | None  # bool [B, M]
    full: Tensor | None  # [B, 1 or H, N, M], bool or additive; it includes causality
    reach: int | None  # a window: the keys at a distance of up to so many; None: no window
    packed: Packed | None = None  # causal, without padding


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
    - Packed rows under causality, perhaps with a window: integers `[1, W + 1, 1, S + 1]`, a view of the S + 1 offsets
      of S sequences; W is 0 without a window.
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
            found = None if padding is not None or kv_offset else _sequences(mask_function, kwargs.get("local_size"))
            if found is not None and found[0].shape[1] == q_length == kv_length and not is_tracing(found[0]):
                return _packed(*found)
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
    if mask.dtype == PACKED:
        reach = int(mask.shape[1]) - 2
        return Seen(None, None, None if reach < 0 else reach, _sequences_in(mask))
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


def _sequences_in(mask: Tensor) -> Packed:
    """Read a mask of packed rows; of a copy, as for a layer on another device, the longest sequence is not known."""
    found = None if torch.compiler.is_compiling() else _packed_by_mask.get(mask)
    return Packed(mask[0, 0, 0].to(torch.int32), None) if found is None else found


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


def _sequences(mask_function: Any, size: int | None) -> tuple[Tensor, int] | None:
    """Return which sequence each token is of, `[B, N]`, and `_window`, 0 without one; None: rows are not packed.

    Its functions are that of causality, perhaps with a window, and that of packed rows. Newer versions of transformers
    give the former positions that start again with each sequence, which within a sequence makes no difference.
    """
    if not isinstance(mask_function, FunctionType) or mask_function.__code__ is not and_masks().__code__:
        return None
    (functions,) = _closure(mask_function)
    if len(functions) != 2 or functions[1].__code__ is not packed_sequence_mask_function(None).__code__:  # type: ignore[arg-type]
        return None
    base, (sequences,) = functions[0], _closure(functions[1])
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    if remap is not None and base.__code__ is remap(None, None).__code__:
        base = next(each for each in _closure(base) if isinstance(each, FunctionType))
    if base is causal_mask_function:
        return sequences, 0
    is_window = size and _alike(base, sliding_window_causal_mask_function(size))
    return (sequences, size) if is_window and size else None


def _packed(sequences: Tensor, window: int) -> Tensor:
    """Return the mask of packed rows, for which an accelerator waits once."""
    begins = torch.ones_like(sequences, dtype=torch.bool)
    begins[:, 1:] = sequences.diff(dim=1) != 0
    offsets = torch.cat([begins.flatten().nonzero()[:, 0], sequences.new_tensor([sequences.numel()])])
    mask = offsets.to(PACKED)[None, None, None].expand(1, window + 1, 1, -1)
    _packed_by_mask[mask] = Packed(offsets.to(torch.int32), int(offsets.diff().max()))
    return mask


def _alike(a: Any, b: Any) -> bool:
    """Return whether two functions have the same code and, in their closures, the same functions and numbers."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        return a.__code__ is b.__code__ and _alike(_closure(a), _closure(b))
    return a is b or (type(a) is type(b) is int and a == b)


def _closure(function: FunctionType) -> tuple[Any, ...]:
    return tuple(cell.cell_contents for cell in function.__closure__ or ())
