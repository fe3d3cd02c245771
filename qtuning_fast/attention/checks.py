"""The checks of prefix attention's arguments, one for each kind of argument.

A wrong value raises a ValueError, a wrong type or dtype a TypeError. The message names the argument, what it must be
and what it was; if two arguments disagree, it names both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtuning_fast.attention.common import GATES, score_dtype

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MAY_BE_EMPTY = {"B", "N", "M", "P"}  # the dimensions that may be 0
FARTHEST = 2**31 - 1  # a wider window is one of this width: no context is longer


class Spec(NamedTuple):
    """How an argument is checked and whether it may train."""

    check: Callable[[Known, str, Any], Any]  # takes a name and its value; returns what the dataclass holds
    differentiable: bool = False  # whether it may require a gradient


def _dims(dims: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of dimensions without a bank, and with one: T exists only then."""
    names = tuple(dims.split())
    return tuple(name for name in names if name != "T"), names


def tensor(dims: str, dtype: str) -> Spec:
    """A tensor of these dimensions."""
    alone, in_bank = _dims(dims)

    def check(known: Known, name: str, x: object) -> Tensor:
        return known.tensor(name, x, dtype, in_bank if known.has_bank else alone)

    return Spec(check, differentiable=True)


def weights(side: str, dims: str) -> Spec:
    """U or V of a reweighting; the ranks of keys and values may differ."""

    rank = f"R of reweight_{side}"
    alone, in_bank = ([rank if dim == "R" else dim for dim in each] for each in _dims(dims))
    public = f"reweight_{side}[{0 if dims.endswith('R') else 1}]"

    def check(known: Known, name: str, x: Tensor | None) -> Tensor | None:
        shape = in_bank if known.has_bank else alone
        return x if x is None else known.tensor(public, x, "query's or float32", shape)

    return Spec(check, differentiable=True)


def gate_parameter() -> Spec:
    """Alpha or tau of the gate: one number, one for each query head, or either for each prefix of a bank."""

    def check(known: Known, name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        shapes: list[tuple[int, ...]] = [(), (known["Hq"],)]
        if known.has_bank:
            shapes += [(known["T"], 1), (known["T"], known["Hq"])]
        if known.tensor(name, x, "query's or float32", dims=None).shape not in shapes:
            raise ValueError(
                f"{name} must be [], [Hq] or, with a bank, [T, 1] or [T, Hq], here one of "
                f"{', '.join(str(list(shape)) for shape in shapes)}, got shape {list(x.shape)}"
            )
        return x

    return Spec(check, differentiable=True)


def query_offsets(known: Known, name: str, x: Tensor | None) -> Tensor | None:
    """Where packed sequences begin and end in query."""
    if not known.is_packed:
        return None
    if x is None:
        raise ValueError(f"{name} must be given beside cu_seqlens_key, got None")
    known.tensor(name, x, "an int32", ("S + 1",))
    if x.shape[0] < 2:
        raise ValueError(f"{name} must be [S + 1], S >= 1, got shape {list(x.shape)}")
    if known["B"] != 1:
        raise ValueError(f"query must hold all sequences in one row beside {name}, B = 1, got B = {known['B']}")
    known.sizes["S"] = (x.shape[0] - 1, name)
    known.offsets["N"] = known.offsets["M"] = x
    _check_offsets(name, x, known["N"], "query")
    return x


def key_offsets(known: Known, name: str, x: Tensor | None) -> Tensor | None:
    """And in key and value; None if they are query's."""
    if x is None or x is known.offsets["M"]:
        if known.is_packed and known["M"] != known["N"]:
            raise ValueError(f"{name} must be given where key has other rows than query, {known['M']} and {known['N']}")
        return None
    known.offsets["M"] = known.tensor(name, x, "an int32", ("S + 1",))
    _check_offsets(name, x, known["M"], "key")
    return x


def longest(dim: str) -> Spec:
    """The rows of the longest packed sequence, or a bound of them."""

    def check(known: Known, name: str, x: object) -> int | None:
        if not known.is_packed:
            if x is not None:
                raise ValueError(f"{name} must be None without packed sequences, got {brief(x)}")
            return None
        offsets, rows = known.offsets[dim], known[dim]
        assert offsets is not None
        if x is None:
            if offsets is known.offsets["N"] and known.longest is not None:
                return known.longest
            known.longest = _longest_of(offsets, rows)
            return known.longest
        if not isinstance(x, int) or isinstance(x, bool):
            raise TypeError(f"{name} must be None or an integer, got {brief(x)}")
        least = _longest_of(offsets, rows) if offsets.is_cpu and not torch.compiler.is_compiling() else 0
        if x < least:
            raise ValueError(f"{name} must be at least {least}, the rows of the longest sequence, got {x}")
        return min(x, rows)

    return Spec(check)


def of_a_bank(dim: str, largest: Callable[[Known], int]) -> Spec:
    """Integers in 0..largest, one for each entry of `dim`; only with a bank."""

    def check(known: Known, name: str, x: Tensor | None) -> Tensor | None:
        if not known.has_bank and x is not None:
            raise ValueError(f"{name} must be None unless prefix_key is a bank [T, Hkv, P, D], got {brief(x)}")
        if x is None:
            if known.has_bank and name == "prefix_index":
                raise ValueError(f"{name} must give each sample's prefix when prefix_key is a bank, got None")
            return None
        each = "S" if dim == "B" and known.is_packed else dim
        _check_range(name, known.tensor(name, x, "an integer", (each,)), largest(known))
        return x

    return Spec(check)


def overlay(dims: str, dtype: str) -> Spec:
    """A mask or bias on scores, bool or additive, without a gradient."""

    names = dims.split()

    def check(known: Known, name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if name != "prefix_bias" and known.is_packed:
            name = known.padding if name == "padding_mask" else name
            raise ValueError(f"{name} must be None beside packed sequences, got {brief(x)}")
        if name == "padding_mask":
            name = known.padding
            known.tensor(name, x, dtype, names)
        else:
            known.broadcasts(name, x, dtype, names)
        if x.requires_grad:
            raise ValueError(f"{name} must not require a gradient, because it gets none; got one that does: detach it")
        return x

    return Spec(check)


def key(known: Known, name: str, x: object) -> Tensor:
    x, heads = known.tensor(name, x, "query's", ("B", "Hkv", "M", "D")), known["Hq"]
    if heads % x.shape[1]:
        raise ValueError(f"query's heads must be a multiple of key's, got Hq = {heads}, Hkv = {x.shape[1]}")
    return x


def n_shared(known: Known, name: str, x: object) -> int:
    if not isinstance(x, int) or isinstance(x, bool):
        raise TypeError(f"{name} must be an integer, got {brief(x)}")
    if not 0 <= x <= known["P"]:
        raise ValueError(f"{name} must lie in 0..{known['P']}, the rows of prefix_key, got {x}")
    return x


def gate(known: Known, name: str, x: object) -> str | None:
    return None if x is None else check_choice(name, x, GATES, "None or ")


def flag(known: Known, name: str, x: object) -> bool:
    return check_flag(name, x)


def scale(known: Known, name: str, x: object) -> float:
    return known["D"] ** -0.5 if x is None else _number(name, x, "None or ")


def softcap(known: Known, name: str, x: object) -> float | None:
    if x is None:
        return None
    cap, scores = _number(name, x, "None or "), torch.finfo(score_dtype(known.query))
    if not scores.tiny <= cap <= scores.max:  # outside, it rounds to 0 or infinity, and scores become NaN
        raise ValueError(
            f"{name} must be None or positive, in {scores.tiny:.3g}..{scores.max:.3g} for scores in {scores.dtype}, "
            f"got {brief(x)}"
        )
    return cap


def gate_number(known: Known, name: str, x: object) -> float:
    return _number(name.replace("number", "gate"), x, "a tensor or ")


def sink(known: Known, name: str, x: object) -> Tensor | None:
    return None if x is None else known.tensor(name, x, "query's or float32", ("Hq",))


def reach(side: int) -> Spec:
    """One half of `window`: a number of keys; None: no bound."""

    def check(known: Known, name: str, x: object) -> int | None:
        if x is None:
            return None
        if not isinstance(x, int) or isinstance(x, bool):
            raise TypeError(f"window[{side}] must be None or an integer, got {brief(x)}")
        if x < 0:
            raise ValueError(f"window[{side}] must be None or at least 0, got {x}")
        return min(x, FARTHEST)

    return Spec(check)


class Known:
    """What earlier arguments fix for later ones: device, dtype and the size of each named dimension."""

    padding = "padding_mask"  # the argument that holds it
    is_packed = False

    def __init__(self, query: object, prefix_key: object) -> None:
        self.has_bank = isinstance(prefix_key, Tensor) and prefix_key.ndim == 4
        self.sizes: dict[str, tuple[int, str]] = {}  # dimension -> its size and the argument that fixed it
        self.offsets: dict[str, Tensor | None] = {"N": None, "M": None}  # of packed sequences
        self.longest: int | None = None  # of the sequences of query, if it was not given
        self.dtypes = {"a floating": FLOATING, "an integer": INTEGER, "a floating or bool": (*FLOATING, torch.bool)}
        self.dtypes["an int32"] = (torch.int32,)
        if isinstance(query, Tensor):
            self.query, self.device = query, query.device
            # The prefix, its reweighting and its gate may be float32 master weights beside a 16-bit query.
            self.dtypes |= {"query's": (query.dtype,), "query's or float32": (query.dtype, torch.float32)}

    def __getitem__(self, dim: str) -> int:
        return self.sizes[dim][0]

    def tensor(self, name: str, x: object, dtype: str, dims: Sequence[str] | None) -> Tensor:
        """Check a tensor except its values; `dtype` names a kind of dtype; `dims` None leaves the shape unchecked."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {brief(x)}")
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
        if x.dtype not in self.dtypes[dtype]:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(self.dtypes[dtype]))
            raise TypeError(f"{name} must have {dtype} dtype ({allowed}), got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, as query is, got one on {x.device}")
        if dims is not None:
            self._check_shape(name, x, dims)
        return x

    def _check_shape(self, name: str, x: Tensor, dims: Sequence[str]) -> None:
        if x.ndim != len(dims):
            raise _misshapen(name, x, dims)
        for dim, size in zip(dims, x.shape):
            settled, origin = self.sizes.setdefault(dim, (size, name))
            if size != settled:
                raise _misshapen(name, x, dims, f", {dim} = {settled} as {origin} has it")
            if size == 0 and dim not in MAY_BE_EMPTY:
                raise _misshapen(name, x, dims, f", {dim} >= 1")

    def broadcasts(self, name: str, x: object, dtype: str, dims: Sequence[str]) -> None:
        """Check that a tensor broadcasts to these dimensions of scores."""
        x = self.tensor(name, x, dtype, dims=None)
        if self.is_packed:  # sequences share their queries' rows of a bias
            dims = [{"B": "S", "N": "1"}.get(dim, dim) for dim in dims]
        sizes = [1 if dim == "1" else self[dim] for dim in dims]
        if x.ndim != len(dims) or any(size not in (1, full) for size, full in zip(x.shape, sizes)):
            padding = " or be [B, M]" if name == "attn_mask" else ""
            raise ValueError(f"{name} must broadcast to [{', '.join(dims)}] = {sizes}{padding}, got {list(x.shape)}")


def _misshapen(name: str, x: Tensor, dims: Sequence[str], also: str = "") -> ValueError:
    return ValueError(f"{name} must be [{', '.join(dims)}]{also}, got shape {list(x.shape)}")


def _check_range(name: str, x: Tensor, high: int) -> None:
    """Check that values lie in 0..high; on the CPU only, because elsewhere that waits for the device.

    While compiling, tensors have no values to check.
    """
    if x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling():
        least, most = int(x.min()), int(x.max())
        if least < 0 or most > high:
            raise ValueError(f"{name} must lie in 0..{high}, got values in {least}..{most}")


def _check_offsets(name: str, x: Tensor, rows: int, of: str) -> None:
    """Check that offsets rise from 0 to the number of rows; on the CPU only, as `_check_range` does."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = x.tolist()
    if values[0] != 0 or values[-1] != rows or values != sorted(values):
        said = values if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
        raise ValueError(f"{name} must rise from 0 to {rows}, the rows of {of}, got {said}")


def _longest_of(offsets: Tensor, rows: int) -> int:
    """Return the rows of the longest sequence, or all rows where they cannot be read: no sequence has more."""
    if torch.compiler.is_compiling() or offsets.is_meta:
        return rows
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        return rows
    return min(max(int(offsets.diff().max()), 0), rows)


def _number(name: str, x: object, instead: str = "") -> float:
    if not isinstance(x, (int, float)) or isinstance(x, bool):
        raise TypeError(f"{name} must be {instead}a number, got {brief(x)}")
    if not abs(x) <= sys.float_info.max:  # rejects NaN, infinity and integers too large for a float
        raise ValueError(f"{name} must be finite, got {brief(x)}")
    return float(x)


def check_flag(name: str, x: object) -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {brief(x)}")
    return x


def check_choice(name: str, x: object, choices: Collection[str], instead: str = "") -> str:
    if not isinstance(x, str):
        raise TypeError(f"{name} must be {instead}a string, got {brief(x)}")
    if x not in choices:
        raise ValueError(f"{name} must be {instead}one of {', '.join(choices)}, got {x!r}")
    return x


def brief(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a {x.dtype} tensor of shape {list(x.shape)}"
    text = repr(x)
    return f"{type(x).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
