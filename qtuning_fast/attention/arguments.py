"""The arguments of prefix attention: one dataclass lists them, and checks, schema and order follow from it.

A complaint is a ValueError or, where the kind of thing is wrong (no tensor, another dtype), a TypeError. It names the
argument, says what it must be and what it was; where two arguments disagree it names the other one too.
"""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from qtuning_fast.attention.common import GATES, score_dtype

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MAY_BE_EMPTY = {"B", "N", "M", "P"}  # no other dimension may


class Spec(NamedTuple):
    """What there is to know of an argument beside its type."""

    check: Callable[["_Known", str, Any], Any]  # of a value by its name; returns it as the dataclass holds it
    trained: bool = False  # whether it may need a gradient


def _tensor(dims: str, dtype: str) -> Spec:
    """A tensor of these dimensions, of which T is there only with a bank."""

    def check(known: "_Known", name: str, x: object) -> Tensor:
        return known.tensor(name, x, dtype, known.dims(dims))

    return Spec(check, trained=True)


def _weights(side: str, dims: str) -> Spec:
    """U or V of a reweighting; keys and values may have different ranks."""

    def check(known: "_Known", name: str, x: Tensor | None) -> Tensor | None:
        index = 0 if name.startswith("U") else 1
        rank = f"R of reweight_{side}"
        named = [rank if dim == "R" else dim for dim in known.dims(dims)]
        return x if x is None else known.tensor(f"reweight_{side}[{index}]", x, "query's or float32", named)

    return Spec(check, trained=True)


def _gate_parameter() -> Spec:
    def check(known: "_Known", name: str, x: Tensor | None) -> Tensor | None:
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

    return Spec(check, trained=True)


def _of_a_bank(dim: str, largest: Callable[["_Known"], int]) -> Spec:
    """Integers in 0..largest, one for each `dim`, only with a bank."""

    def check(known: "_Known", name: str, x: Tensor | None) -> Tensor | None:
        if not known.has_bank and x is not None:
            raise ValueError(f"{name} must be None unless prefix_key is a bank [T, Hkv, P, D], got {_brief(x)}")
        if x is None:
            if known.has_bank and name == "prefix_index":
                raise ValueError(f"{name} must say which prefix each sample uses, as prefix_key is a bank, got None")
            return None
        _check_range(name, known.tensor(name, x, "an integer", (dim,)), largest(known))
        return x

    return Spec(check)


def _overlay(dims: str, dtype: str) -> Spec:
    """What is added to scores, or says which of them count. It carries no gradient."""

    def check(known: "_Known", name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if name == "padding_mask":
            name = "attn_mask"
            known.tensor(name, x, dtype, dims.split())
        else:
            known.broadcasts(name, x, dtype, dims.split())
        if x.requires_grad:
            raise ValueError(f"{name} must not require a gradient, since it gets none; got one that does: detach it")
        return x

    return Spec(check)


def _key(known: "_Known", name: str, x: object) -> Tensor:
    x, heads = known.tensor(name, x, "query's", known.dims("B Hkv M D")), known["Hq"]
    if heads % x.shape[1]:
        raise ValueError(f"query's heads must be a multiple of key's, got Hq = {heads}, Hkv = {x.shape[1]}")
    return x


def _n_shared(known: "_Known", name: str, x: object) -> int:
    if not isinstance(x, int) or isinstance(x, bool):
        raise TypeError(f"{name} must be an integer, got {_brief(x)}")
    if not 0 <= x <= known["P"]:
        raise ValueError(f"{name} must lie in 0..{known['P']}, the rows of prefix_key, got {x}")
    return x


def _gate(known: "_Known", name: str, x: object) -> str | None:
    return None if x is None else check_choice(name, x, GATES, "None or ")


def _flag(known: "_Known", name: str, x: object) -> bool:
    return check_flag(name, x)


def _scale(known: "_Known", name: str, x: object) -> float:
    return known["D"] ** -0.5 if x is None else _number(name, x, "None or ")


def _softcap(known: "_Known", name: str, x: object) -> float | None:
    if x is None:
        return None
    cap, scores = _number(name, x, "None or "), torch.finfo(score_dtype(known.query))
    if not scores.tiny <= cap <= scores.max:  # beyond, it rounds to 0 or infinity, and scores to NaN
        raise ValueError(
            f"{name} must be None or positive, in {scores.tiny:.3g}..{scores.max:.3g} for scores in {scores.dtype}, "
            f"got {_brief(x)}"
        )
    return cap


def _gate_number(known: "_Known", name: str, x: object) -> float:
    return _number(name.replace("number", "gate"), x, "a tensor or ")


@dataclass(eq=False)
class PrefixAttentionCall:
    """The arguments of `prefix_attention`, known to be right and with their defaults filled in. Not to be changed.

    (It is not frozen, for that takes the host seven microseconds a call. `dataclasses.replace` makes another.)

    Sizes: `B` batch, `N` queries, `M` context keys, `P` prefix rows, `Hq` and `Hkv` heads, `T` prefixes in a bank,
    `R` rank. What belongs to the prefix (rows, reweighting, gate) is of query's dtype or float32. The public arguments
    `reweight_key`, `reweight_value`, `gate_alpha`, `gate_tau` and `attn_mask` are two fields each, so that a field is
    what a custom operator can take: a tensor, a number, a string.
    """

    query: Annotated[Tensor, _tensor("B Hq N D", "a floating")]
    key: Annotated[Tensor, Spec(_key, trained=True)]  # [B, Hkv, M, D]
    value: Annotated[Tensor, _tensor("B Hkv M Dv", "query's")]
    prefix_key: Annotated[Tensor, _tensor("T Hkv P D", "query's or float32")]
    prefix_value: Annotated[Tensor, _tensor("T Hkv P Dv", "query's or float32")]
    U_key: Annotated[Tensor | None, _weights("key", "T P R")]
    V_key: Annotated[Tensor | None, _weights("key", "T R Hkv D")]
    U_value: Annotated[Tensor | None, _weights("value", "T P R")]
    V_value: Annotated[Tensor | None, _weights("value", "T R Hkv Dv")]
    gate_alpha: Annotated[Tensor | None, _gate_parameter()]  # [] or [Hq], with a bank also [T, 1] or [T, Hq], or None
    gate_tau: Annotated[Tensor | None, _gate_parameter()]  # like gate_alpha, but not necessarily of its shape
    number_alpha: Annotated[float, Spec(_gate_number)]  # where gate_alpha is None
    number_tau: Annotated[float, Spec(_gate_number)]
    prefix_index: Annotated[
        Tensor | None, _of_a_bank("B", lambda known: known["T"] - 1)
    ]  # on the CPU only it is checked
    prefix_length: Annotated[Tensor | None, _of_a_bank("T", lambda known: known["P"])]  # None: P for all
    padding_mask: Annotated[Tensor | None, _overlay("B M", "a floating or bool")]  # excludes attn_mask
    attn_mask: Annotated[Tensor | None, _overlay("B Hq N M", "a floating or bool")]  # 4-D, each dimension may be 1
    prefix_bias: Annotated[Tensor | None, _overlay("B Hq N P", "a floating")]  # likewise
    n_shared: Annotated[int, Spec(_n_shared)]  # the first rows, not reweighted
    gate: Annotated[str | None, Spec(_gate)]  # None: alpha and tau mean nothing
    is_causal: Annotated[bool, Spec(_flag)]  # bottom-right: query i sees context key j when j <= i + M - N
    scale: Annotated[float, Spec(_scale)]
    softcap: Annotated[float | None, Spec(_softcap)]  # scores are capped, softly, before gate and masks

    @property
    def reweight_key(self) -> tuple[Tensor, Tensor] | None:
        return None if self.U_key is None or self.V_key is None else (self.U_key, self.V_key)

    @property
    def reweight_value(self) -> tuple[Tensor, Tensor] | None:
        return None if self.U_value is None or self.V_value is None else (self.U_value, self.V_value)

    @property
    def alpha(self) -> float | Tensor:
        return self.number_alpha if self.gate_alpha is None else self.gate_alpha

    @property
    def tau(self) -> float | Tensor:
        return self.number_tau if self.gate_tau is None else self.gate_tau


class PrefixArguments(TypedDict, total=False):
    """What of `prefix_attention`'s arguments is about the prefix, by name: what stands on a layer of a model."""

    prefix_key: Tensor
    prefix_value: Tensor
    prefix_index: Tensor | None
    prefix_length: Tensor | None
    prefix_bias: Tensor | None
    n_shared: int
    reweight_key: tuple[Tensor, Tensor] | None
    reweight_value: tuple[Tensor, Tensor] | None
    gate: str | None
    gate_alpha: float | Tensor
    gate_tau: float | Tensor


_FIELDS = {each.name: get_args(each.type) for each in fields(PrefixAttentionCall)}  # name -> its type and its Spec
INPUTS = tuple(name for name, (_, spec) in _FIELDS.items() if spec.trained)

# The types as PyTorch's operators spell them: an operator takes the fields one by one.
_TYPES: dict[Any, str] = {
    **{Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", bool: "bool"},
    **{float: "float", float | None: "float?", str | None: "str?"},
}
SCHEMA = ", ".join(f"{_TYPES[kind]} {name}" for name, (kind, _) in _FIELDS.items())
_CHECKS = tuple((name, spec.check) for name, (_, spec) in _FIELDS.items())


def flattened(call: PrefixAttentionCall) -> tuple[Any, ...]:
    """The fields one by one, as operators take them; `PrefixAttentionCall(*fields)` undoes it."""
    return tuple([getattr(call, name) for name in _FIELDS])


def checked(arguments: Mapping[str, Any]) -> PrefixAttentionCall:
    """All arguments of prefix_attention, by name, as backends take them.

    Raises:
        TypeError, ValueError: one of them is wrong; the message names it.
    """
    given = dict(arguments)
    for side in ("key", "value"):
        given[f"U_{side}"], given[f"V_{side}"] = _pair(f"reweight_{side}", arguments[f"reweight_{side}"])
    for name in ("alpha", "tau"):
        x = arguments[f"gate_{name}"]
        given[f"gate_{name}"], given[f"number_{name}"] = (x, 1.0) if isinstance(x, Tensor) else (None, x)
    mask = arguments["attn_mask"]
    is_padding = isinstance(mask, Tensor) and mask.ndim == 2
    given["padding_mask"], given["attn_mask"] = (mask, None) if is_padding else (None, mask)

    known = _Known(given["query"], given["prefix_key"])
    return PrefixAttentionCall(*[check(known, name, given[name]) for name, check in _CHECKS])


def _pair(name: str, pair: object) -> tuple[Any, Any]:
    """U and V of a reweighting W = U Vᵀ, or two None."""
    if pair is None:
        return None, None
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be None or a pair of tensors (U, V), got {_brief(pair)}")
    for index, x in enumerate(pair):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{index}] must be a tensor, got {_brief(x)}")
    return pair[0], pair[1]


class _Known:
    """What the arguments so far have settled for the next: device, dtype, and the size of each named dimension."""

    def __init__(self, query: object, prefix_key: object) -> None:
        self.has_bank = isinstance(prefix_key, Tensor) and prefix_key.ndim == 4
        self.sizes: dict[str, tuple[int, str]] = {}  # dimension -> its size, and the argument that had it first
        self.dtypes = {"a floating": FLOATING, "an integer": INTEGER, "a floating or bool": (*FLOATING, torch.bool)}
        if isinstance(query, Tensor):
            self.query = query
            # Whatever belongs to the prefix may be a float32 master weight beside a 16-bit query.
            self.dtypes |= {"query's": (query.dtype,), "query's or float32": (query.dtype, torch.float32)}

    def __getitem__(self, dim: str) -> int:
        return self.sizes[dim][0]

    def dims(self, dims: str) -> list[str]:
        """Names of dimensions, T only with a bank."""
        return [dim for dim in dims.split() if dim != "T" or self.has_bank]

    def tensor(self, name: str, x: object, dtype: str, dims: Sequence[str] | None) -> Tensor:
        """Checks all of a tensor but its values; `dtype` is a kind of dtype, `dims` None where the caller looks."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_brief(x)}")
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
        if x.dtype not in self.dtypes[dtype]:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(self.dtypes[dtype]))
            raise TypeError(f"{name} must have {dtype} dtype ({allowed}), got {x.dtype}")
        if x.device != self.query.device:
            raise ValueError(f"{name} must be on {self.query.device}, as query is, got one on {x.device}")
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
        """Checks what is laid over scores."""
        x = self.tensor(name, x, dtype, dims=None)
        sizes = [self[dim] for dim in dims]
        if x.ndim != len(dims) or any(size not in (1, full) for size, full in zip(x.shape, sizes)):
            padding = " or be [B, M]" if name == "attn_mask" else ""
            raise ValueError(f"{name} must broadcast to [{', '.join(dims)}] = {sizes}{padding}, got {list(x.shape)}")


def _misshapen(name: str, x: Tensor, dims: Sequence[str], also: str = "") -> ValueError:
    return ValueError(f"{name} must be [{', '.join(dims)}]{also}, got shape {list(x.shape)}")


def _check_range(name: str, x: Tensor, high: int) -> None:
    """0..high, on the CPU only: elsewhere a look at the values waits for the device. A compiler has none to show."""
    if x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling():
        least, most = int(x.min()), int(x.max())
        if least < 0 or most > high:
            raise ValueError(f"{name} must lie in 0..{high}, got values in {least}..{most}")


def _number(name: str, x: object, instead: str = "") -> float:
    if not isinstance(x, (int, float)) or isinstance(x, bool):
        raise TypeError(f"{name} must be {instead}a number, got {_brief(x)}")
    if not abs(x) <= sys.float_info.max:  # neither NaN nor infinite, nor an int that no float can hold
        raise ValueError(f"{name} must be finite, got {_brief(x)}")
    return float(x)


def check_flag(name: str, x: object) -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {_brief(x)}")
    return x


def check_choice(name: str, x: object, choices: Collection[str], instead: str = "") -> str:
    if not isinstance(x, str):
        raise TypeError(f"{name} must be {instead}a string, got {_brief(x)}")
    if x not in choices:
        raise ValueError(f"{name} must be {instead}one of {', '.join(choices)}, got {x!r}")
    return x


def _brief(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a {x.dtype} tensor of shape {list(x.shape)}"
    text = repr(x)
    return f"{type(x).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
