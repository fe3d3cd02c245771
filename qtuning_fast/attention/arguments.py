"""The arguments of prefix attention: one dataclass lists them; their checks, schema and order derive from it.

A wrong value raises a ValueError, a wrong type or dtype a TypeError. The message names the argument, what it must be
and what it was; if two arguments disagree, it names both.
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
MAY_BE_EMPTY = {"B", "N", "M", "P"}  # the dimensions that may be 0
FARTHEST = 2**31 - 1  # a wider window is one of this width: no context is longer


class Spec(NamedTuple):
    """How an argument is checked and whether it may train."""

    check: Callable[["_Known", str, Any], Any]  # takes a name and its value; returns what the dataclass holds
    differentiable: bool = False  # whether it may require a gradient


def _dims(dims: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of dimensions without a bank, and with one: T exists only then."""
    names = tuple(dims.split())
    return tuple(name for name in names if name != "T"), names


def _tensor(dims: str, dtype: str) -> Spec:
    """A tensor of these dimensions."""
    alone, in_bank = _dims(dims)

    def check(known: "_Known", name: str, x: object) -> Tensor:
        return known.tensor(name, x, dtype, in_bank if known.has_bank else alone)

    return Spec(check, differentiable=True)


def _weights(side: str, dims: str) -> Spec:
    """U or V of a reweighting; the ranks of keys and values may differ."""

    rank = f"R of reweight_{side}"
    alone, in_bank = ([rank if dim == "R" else dim for dim in each] for each in _dims(dims))
    public = f"reweight_{side}[{0 if dims.endswith('R') else 1}]"

    def check(known: "_Known", name: str, x: Tensor | None) -> Tensor | None:
        shape = in_bank if known.has_bank else alone
        return x if x is None else known.tensor(public, x, "query's or float32", shape)

    return Spec(check, differentiable=True)


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

    return Spec(check, differentiable=True)


def _query_offsets(known: "_Known", name: str, x: Tensor | None) -> Tensor | None:
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


def _key_offsets(known: "_Known", name: str, x: Tensor | None) -> Tensor | None:
    """And in key and value; None if they are query's."""
    if x is None or x is known.offsets["M"]:
        if known.is_packed and known["M"] != known["N"]:
            raise ValueError(f"{name} must be given where key has other rows than query, {known['M']} and {known['N']}")
        return None
    known.offsets["M"] = known.tensor(name, x, "an int32", ("S + 1",))
    _check_offsets(name, x, known["M"], "key")
    return x


def _longest(dim: str) -> Spec:
    """The rows of the longest packed sequence, or a bound of them."""

    def check(known: "_Known", name: str, x: object) -> int | None:
        if not known.is_packed:
            if x is not None:
                raise ValueError(f"{name} must be None without packed sequences, got {_brief(x)}")
            return None
        offsets, rows = known.offsets[dim], known[dim]
        assert offsets is not None
        if x is None:
            if offsets is known.offsets["N"] and known.longest is not None:
                return known.longest
            known.longest = _longest_of(offsets, rows)
            return known.longest
        if not isinstance(x, int) or isinstance(x, bool):
            raise TypeError(f"{name} must be None or an integer, got {_brief(x)}")
        least = _longest_of(offsets, rows) if offsets.is_cpu and not torch.compiler.is_compiling() else 0
        if x < least:
            raise ValueError(f"{name} must be at least {least}, the rows of the longest sequence, got {x}")
        return min(x, rows)

    return Spec(check)


def _of_a_bank(dim: str, largest: Callable[["_Known"], int]) -> Spec:
    """Integers in 0..largest, one for each entry of `dim`; only with a bank."""

    def check(known: "_Known", name: str, x: Tensor | None) -> Tensor | None:
        if not known.has_bank and x is not None:
            raise ValueError(f"{name} must be None unless prefix_key is a bank [T, Hkv, P, D], got {_brief(x)}")
        if x is None:
            if known.has_bank and name == "prefix_index":
                raise ValueError(f"{name} must give each sample's prefix when prefix_key is a bank, got None")
            return None
        each = "S" if dim == "B" and known.is_packed else dim
        _check_range(name, known.tensor(name, x, "an integer", (each,)), largest(known))
        return x

    return Spec(check)


def _overlay(dims: str, dtype: str) -> Spec:
    """A mask or bias on scores, bool or additive, without a gradient."""

    names = dims.split()

    def check(known: "_Known", name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if name != "prefix_bias" and known.is_packed:
            name = known.padding if name == "padding_mask" else name
            raise ValueError(f"{name} must be None beside packed sequences, got {_brief(x)}")
        if name == "padding_mask":
            name = known.padding
            known.tensor(name, x, dtype, names)
        else:
            known.broadcasts(name, x, dtype, names)
        if x.requires_grad:
            raise ValueError(f"{name} must not require a gradient, because it gets none; got one that does: detach it")
        return x

    return Spec(check)


def _key(known: "_Known", name: str, x: object) -> Tensor:
    x, heads = known.tensor(name, x, "query's", ("B", "Hkv", "M", "D")), known["Hq"]
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
    if not scores.tiny <= cap <= scores.max:  # outside, it rounds to 0 or infinity, and scores become NaN
        raise ValueError(
            f"{name} must be None or positive, in {scores.tiny:.3g}..{scores.max:.3g} for scores in {scores.dtype}, "
            f"got {_brief(x)}"
        )
    return cap


def _gate_number(known: "_Known", name: str, x: object) -> float:
    return _number(name.replace("number", "gate"), x, "a tensor or ")


def _sink(known: "_Known", name: str, x: object) -> Tensor | None:
    return None if x is None else known.tensor(name, x, "query's or float32", ("Hq",))


def _reach(side: int) -> Spec:
    """One half of `window`: a number of keys; None: no bound."""

    def check(known: "_Known", name: str, x: object) -> int | None:
        if x is None:
            return None
        if not isinstance(x, int) or isinstance(x, bool):
            raise TypeError(f"window[{side}] must be None or an integer, got {_brief(x)}")
        if x < 0:
            raise ValueError(f"window[{side}] must be None or at least 0, got {x}")
        return min(x, FARTHEST)

    return Spec(check)


@dataclass(eq=False)
class PrefixAttentionCall:
    """The checked arguments of `prefix_attention`, with defaults filled in. Treat it as immutable.

    (Freezing it would cost the host seven microseconds a call. Use `dataclasses.replace` to change a field.)

    Sizes: `B` batch, `N` queries, `M` context keys, `P` prefix rows, `Hq` and `Hkv` heads, `T` prefixes in a bank,
    `R` rank. The tensors of prefix, reweighting and gate are in query's dtype or float32. The public arguments
    `reweight_key`, `reweight_value`, `gate_alpha`, `gate_tau` and `window` are split into two fields each, so that
    every field has a type that a custom operator accepts: a tensor, a number or a string. `padding_mask` is also where
    an `attn_mask` of two dimensions ends up.

    Of S packed sequences B is 1, N and M count the rows of all of them, and there are S entries where B are named for
    prefix_index and prefix_bias, whose N is 1. Offsets are checked on the CPU only.
    """

    query: Annotated[Tensor, _tensor("B Hq N D", "a floating")]
    key: Annotated[Tensor, Spec(_key, differentiable=True)]  # [B, Hkv, M, D]
    value: Annotated[Tensor, _tensor("B Hkv M Dv", "query's")]
    prefix_key: Annotated[Tensor, _tensor("T Hkv P D", "query's or float32")]
    prefix_value: Annotated[Tensor, _tensor("T Hkv P Dv", "query's or float32")]
    U_key: Annotated[Tensor | None, _weights("key", "T P R")]
    V_key: Annotated[Tensor | None, _weights("key", "T R Hkv D")]
    U_value: Annotated[Tensor | None, _weights("value", "T P R")]
    V_value: Annotated[Tensor | None, _weights("value", "T R Hkv Dv")]
    gate_alpha: Annotated[Tensor | None, _gate_parameter()]  # [] or [Hq], with a bank also [T, 1] or [T, Hq], or None
    gate_tau: Annotated[Tensor | None, _gate_parameter()]  # like gate_alpha; the two shapes may differ
    sink: Annotated[Tensor | None, Spec(_sink, differentiable=True)]  # [Hq], one more score in each head's softmax
    number_alpha: Annotated[float, Spec(_gate_number)]  # used if gate_alpha is None
    number_tau: Annotated[float, Spec(_gate_number)]
    cu_seqlens_query: Annotated[Tensor | None, Spec(_query_offsets)]  # [S + 1]: rows 0..N cut into packed sequences
    cu_seqlens_key: Annotated[
        Tensor | None, Spec(_key_offsets)
    ]  # likewise; None if they are query's, or none is packed
    max_seqlen_query: Annotated[int | None, _longest("N")]  # of the longest sequence, or more; None if none is packed
    max_seqlen_key: Annotated[int | None, _longest("M")]
    prefix_index: Annotated[Tensor | None, _of_a_bank("B", lambda known: known["T"] - 1)]  # checked on the CPU only
    prefix_length: Annotated[Tensor | None, _of_a_bank("T", lambda known: known["P"])]  # None: P for all
    padding_mask: Annotated[Tensor | None, _overlay("B M", "a floating or bool")]
    attn_mask: Annotated[Tensor | None, _overlay("B Hq N M", "a floating or bool")]  # 4-D, any dimension may be 1
    prefix_bias: Annotated[Tensor | None, _overlay("B Hq N P", "a floating")]  # likewise
    n_shared: Annotated[int, Spec(_n_shared)]  # number of leading rows that are not reweighted
    gate: Annotated[str | None, Spec(_gate)]  # None: alpha and tau are ignored
    is_causal: Annotated[bool, Spec(_flag)]  # bottom-right: query i sees context key j when j <= i + M - N
    window_left: Annotated[int | None, _reach(0)]  # query i sees context key j when j >= i + M - N - window_left
    window_right: Annotated[int | None, _reach(1)]  # and when j <= i + M - N + window_right
    scale: Annotated[float, Spec(_scale)]
    softcap: Annotated[float | None, Spec(_softcap)]  # soft cap on scores, before gate and masks

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_query is not None

    @property
    def key_offsets(self) -> Tensor | None:
        """Where packed sequences begin and end in key and value; None: none is packed."""
        return self.cu_seqlens_query if self.cu_seqlens_key is None else self.cu_seqlens_key

    @property
    def reweight_key(self) -> tuple[Tensor, Tensor] | None:
        return None if self.U_key is None or self.V_key is None else (self.U_key, self.V_key)

    @property
    def reweight_value(self) -> tuple[Tensor, Tensor] | None:
        return None if self.U_value is None or self.V_value is None else (self.U_value, self.V_value)

    @property
    def keys_before(self) -> int | None:
        """How many keys before its own position a query sees; None: all there are."""
        left = self.window_left
        return None if left is None or _reaches(left, self.key, self.max_seqlen_key) else left

    @property
    def keys_after(self) -> int | None:
        """How many keys after its own position a query sees, 0 under causality; None: all there are."""
        right = 0 if self.is_causal else self.window_right
        return None if right is None or (right and _reaches(right, self.query, self.max_seqlen_query)) else right

    @property
    def alpha(self) -> float | Tensor:
        return self.number_alpha if self.gate_alpha is None else self.gate_alpha

    @property
    def tau(self) -> float | Tensor:
        return self.number_tau if self.gate_tau is None else self.gate_tau


def _reaches(reach: int, x: Tensor, longest: int | None) -> bool:
    """Return whether a window reaches over all rows of x, or over those of the longest packed sequence.

    Exported sizes may be dynamic, and a comparison would bound them.
    """
    return not torch.compiler.is_exporting() and reach >= (x.shape[2] if longest is None else longest) - 1


class PrefixArguments(TypedDict, total=False):
    """The arguments of `prefix_attention` that describe a prefix, by name, as placed on a layer of a model."""

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
INPUTS = tuple(name for name, (_, spec) in _FIELDS.items() if spec.differentiable)

# Types in the notation of PyTorch's operator schemas; an operator takes the fields one by one.
_TYPES: dict[Any, str] = {
    **{Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", int | None: "SymInt?", bool: "bool"},
    **{float: "float", float | None: "float?", str | None: "str?"},
}
SCHEMA = ", ".join(f"{_TYPES[kind]} {name}" for name, (kind, _) in _FIELDS.items())
_CHECKS = tuple((name, spec.check) for name, (_, spec) in _FIELDS.items())


def trainable(call: PrefixAttentionCall) -> list[str]:
    """Return the names of the call's tensors that may require a gradient."""
    return [name for name in INPUTS if getattr(call, name) is not None]


def flattened(call: PrefixAttentionCall) -> tuple[Any, ...]:
    """Return the fields one by one, as operators take them; `PrefixAttentionCall(*fields)` is the inverse."""
    return tuple([getattr(call, name) for name in _FIELDS])


def checked(arguments: Mapping[str, Any]) -> PrefixAttentionCall:
    """Check all arguments of prefix_attention, given by name, and return the call that backends take.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    given = dict(arguments)
    given["U_key"], given["V_key"] = _pair("reweight_key", arguments["reweight_key"])
    given["U_value"], given["V_value"] = _pair("reweight_value", arguments["reweight_value"])
    given["gate_alpha"], given["number_alpha"] = _tensor_or_number(arguments["gate_alpha"])
    given["gate_tau"], given["number_tau"] = _tensor_or_number(arguments["gate_tau"])
    given["window_left"], given["window_right"] = _window(arguments["window"])
    known = _Known(given["query"], given["prefix_key"])
    known.is_packed = any(arguments[f"cu_seqlens_{side}"] is not None for side in ("query", "key"))
    mask, padding = arguments["attn_mask"], arguments["padding_mask"]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if padding is not None:
            raise ValueError(f"attn_mask must have four dimensions beside a padding_mask, got shape {list(mask.shape)}")
        given["padding_mask"], given["attn_mask"], known.padding = mask, None, "attn_mask"
    return PrefixAttentionCall(*[check(known, name, given[name]) for name, check in _CHECKS])


def _window(pair: object) -> tuple[Any, Any]:
    """Return both halves of a window, or None twice."""
    if pair is None:
        return None, None
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"window must be None or a pair (left, right), got {_brief(pair)}")
    return pair[0], pair[1]


def _tensor_or_number(x: object) -> tuple[Tensor | None, object]:
    return (x, 1.0) if isinstance(x, Tensor) else (None, x)


def _pair(name: str, pair: object) -> tuple[Any, Any]:
    """Return U and V of a reweighting W = U V, or None twice."""
    if pair is None:
        return None, None
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be None or a pair of tensors (U, V), got {_brief(pair)}")
    for index, x in enumerate(pair):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{index}] must be a tensor, got {_brief(x)}")
    return pair[0], pair[1]


class _Known:
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
            raise TypeError(f"{name} must be a tensor, got {_brief(x)}")
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
        raise TypeError(f"{name} must be {instead}a number, got {_brief(x)}")
    if not abs(x) <= sys.float_info.max:  # rejects NaN, infinity and integers too large for a float
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
