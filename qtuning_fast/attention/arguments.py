"""Every check of prefix_attention's arguments, made before anything is computed.

A complaint is a ValueError or, where the kind of thing is wrong (no tensor, another dtype), a TypeError. It names the
argument, says what it must be and what it was; where two arguments disagree it names the other one too.
"""

import sys
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from qtuning_fast.attention import dispatch
from qtuning_fast.attention.call import PrefixAttentionCall
from qtuning_fast.attention.reference import GATES, score_dtype

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MAY_BE_EMPTY = {"B", "N", "M", "P"}  # no other dimension may


def validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    prefix_index: Tensor | None,
    prefix_length: Tensor | None,
    n_shared: int,
    reweight_key: tuple[Tensor, Tensor] | None,
    reweight_value: tuple[Tensor, Tensor] | None,
    gate: str | None,
    gate_alpha: float | Tensor,
    gate_tau: float | Tensor,
    attn_mask: Tensor | None,
    prefix_bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    return_lse: bool,
    backend: str,
) -> PrefixAttentionCall:
    """prefix_attention's arguments as backends take them, or a ValueError or TypeError that names the wrong one."""
    known = _Known(query)
    known.tensor("key", key, "query's", ("B", "Hkv", "M", "D"))
    known.tensor("value", value, "query's", ("B", "Hkv", "M", "Dv"))
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query's heads must be a multiple of key's, got Hq = {query.shape[1]}, Hkv = {key.shape[1]}")

    has_bank = isinstance(prefix_key, Tensor) and prefix_key.ndim == 4
    bank = ("T",) if has_bank else ()
    known.tensor("prefix_key", prefix_key, "query's or float32", (*bank, "Hkv", "P", "D"))
    known.tensor("prefix_value", prefix_value, "query's or float32", (*bank, "Hkv", "P", "Dv"))
    _check_index_and_length(known, has_bank, prefix_index, prefix_length)
    _check_n_shared(known, n_shared)
    _check_gate(known, gate, has_bank, gate_alpha=gate_alpha, gate_tau=gate_tau)

    padding_mask = None
    if isinstance(attn_mask, Tensor) and attn_mask.ndim == 2:
        padding_mask, attn_mask = attn_mask, None
        known.tensor("attn_mask", padding_mask, "a floating or bool", ("B", "M"))
        _refuse_gradient("attn_mask", padding_mask)
    if attn_mask is not None:
        known.additive("attn_mask", attn_mask, "a floating or bool", ("B", "Hq", "N", "M"))
    if prefix_bias is not None:
        known.additive("prefix_bias", prefix_bias, "a floating", ("B", "Hq", "N", "P"))

    _check_flag("is_causal", is_causal)
    _check_flag("return_lse", return_lse)
    _check_choice("backend", backend, dispatch.NAMES)
    return PrefixAttentionCall(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        prefix_index=prefix_index,
        prefix_length=prefix_length,
        n_shared=n_shared,
        reweight_key=_pair(known, "reweight_key", reweight_key, bank, "D"),
        reweight_value=_pair(known, "reweight_value", reweight_value, bank, "Dv"),
        gate=gate,
        gate_alpha=gate_alpha,
        gate_tau=gate_tau,
        padding_mask=padding_mask,
        attn_mask=attn_mask,
        prefix_bias=prefix_bias,
        is_causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else _number("scale", scale, "None or "),
        softcap=None if softcap is None else _cap(query, softcap),
    )


class _Known:
    """What the arguments so far have settled for the next: device, dtype, and the size of each named dimension."""

    def __init__(self, query: Tensor) -> None:
        self.device: torch.device | None = None
        self.dtypes = {"a floating": FLOATING, "an integer": INTEGER, "a floating or bool": (*FLOATING, torch.bool)}
        self.sizes: dict[str, tuple[int, str]] = {}  # dimension -> its size, and the argument that had it first
        self.tensor("query", query, "a floating", ("B", "Hq", "N", "D"))
        self.device = query.device
        # Whatever belongs to the prefix may be a float32 master weight beside a 16-bit query.
        self.dtypes |= {"query's": (query.dtype,), "query's or float32": (query.dtype, torch.float32)}

    def __getitem__(self, dim: str) -> int:
        return self.sizes[dim][0]

    def tensor(self, name: str, x: object, dtype: str, dims: Sequence[str] | None) -> Tensor:
        """Checks all of a tensor but its values; `dtype` is a kind of dtype, `dims` None where the caller looks."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {_brief(x)}")
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
        if x.dtype not in self.dtypes[dtype]:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(self.dtypes[dtype]))
            raise TypeError(f"{name} must have {dtype} dtype ({allowed}), got {x.dtype}")
        if self.device is not None and x.device != self.device:
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

    def additive(self, name: str, x: object, dtype: str, dims: Sequence[str]) -> None:
        """Checks what is laid over scores: it broadcasts to them, and it carries no gradient."""
        x = self.tensor(name, x, dtype, dims=None)
        sizes = [self[dim] for dim in dims]
        if x.ndim != len(dims) or any(size not in (1, full) for size, full in zip(x.shape, sizes)):
            padding = " or be [B, M]" if name == "attn_mask" else ""
            raise ValueError(f"{name} must broadcast to [{', '.join(dims)}] = {sizes}{padding}, got {list(x.shape)}")
        _refuse_gradient(name, x)


def _misshapen(name: str, x: Tensor, dims: Sequence[str], also: str = "") -> ValueError:
    return ValueError(f"{name} must be [{', '.join(dims)}]{also}, got shape {list(x.shape)}")


def _check_index_and_length(
    known: _Known, has_bank: bool, prefix_index: Tensor | None, prefix_length: Tensor | None
) -> None:
    if not has_bank:
        for name, x in (("prefix_index", prefix_index), ("prefix_length", prefix_length)):
            if x is not None:
                raise ValueError(f"{name} must be None unless prefix_key is a bank [T, Hkv, P, D], got {_brief(x)}")
        return
    if prefix_index is None:
        raise ValueError("prefix_index must say which prefix each sample uses, as prefix_key is a bank, got None")
    known.tensor("prefix_index", prefix_index, "an integer", ("B",))
    _check_range("prefix_index", prefix_index, known["T"] - 1)
    if prefix_length is not None:
        known.tensor("prefix_length", prefix_length, "an integer", ("T",))
        _check_range("prefix_length", prefix_length, known["P"])


def _check_range(name: str, x: Tensor, high: int) -> None:
    """0..high, on the CPU only: elsewhere a look at the values waits for the device. A compiler has none to show."""
    if x.device.type == "cpu" and x.numel() and not torch.compiler.is_compiling():
        least, most = int(x.min()), int(x.max())
        if least < 0 or most > high:
            raise ValueError(f"{name} must lie in 0..{high}, got values in {least}..{most}")


def _check_n_shared(known: _Known, n_shared: int) -> None:
    if not isinstance(n_shared, int) or isinstance(n_shared, bool):
        raise TypeError(f"n_shared must be an integer, got {_brief(n_shared)}")
    if not 0 <= n_shared <= known["P"]:
        raise ValueError(f"n_shared must lie in 0..{known['P']}, the rows of prefix_key, got {n_shared}")


def _check_gate(known: _Known, gate: str | None, has_bank: bool, **parameters: float | Tensor) -> None:
    if gate is not None:
        _check_choice("gate", gate, GATES, "None or ")
    shapes: list[tuple[int, ...]] = [(), (known["Hq"],)]
    if has_bank:
        shapes += [(known["T"], 1), (known["T"], known["Hq"])]
    for name, x in parameters.items():
        if not isinstance(x, Tensor):
            _number(name, x, "a tensor or ")
        elif known.tensor(name, x, "query's or float32", dims=None).shape not in shapes:
            raise ValueError(
                f"{name} must be [], [Hq] or, with a bank, [T, 1] or [T, Hq], here one of "
                f"{', '.join(str(list(shape)) for shape in shapes)}, got shape {list(x.shape)}"
            )


def _pair(
    known: _Known, name: str, pair: tuple[Tensor, Tensor] | None, bank: tuple[str, ...], size: str
) -> tuple[Tensor, Tensor] | None:
    """The pair (U, V) of a reweighting W = U Vᵀ."""
    if pair is None:
        return None
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be None or a pair of tensors (U, V), got {_brief(pair)}")
    rank = f"R of {name}"  # keys and values may have different ranks
    U = known.tensor(f"{name}[0]", pair[0], "query's or float32", (*bank, "P", rank))
    V = known.tensor(f"{name}[1]", pair[1], "query's or float32", (*bank, rank, "Hkv", size))
    return U, V


def _cap(query: Tensor, softcap: float) -> float:
    cap, scores = _number("softcap", softcap, "None or "), torch.finfo(score_dtype(query))
    if not scores.tiny <= cap <= scores.max:  # beyond, it rounds to 0 or infinity, and scores to NaN
        raise ValueError(
            f"softcap must be None or positive, in {scores.tiny:.3g}..{scores.max:.3g} for scores in {scores.dtype}, "
            f"got {_brief(softcap)}"
        )
    return cap


def _refuse_gradient(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(f"{name} must not require a gradient, since it gets none; got one that does: detach it")


def _number(name: str, x: object, instead: str = "") -> float:
    if not isinstance(x, (int, float)) or isinstance(x, bool):
        raise TypeError(f"{name} must be {instead}a number, got {_brief(x)}")
    if not abs(x) <= sys.float_info.max:  # neither NaN nor infinite, nor an int that no float can hold
        raise ValueError(f"{name} must be finite, got {_brief(x)}")
    return float(x)


def _check_flag(name: str, x: object) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {_brief(x)}")


def _check_choice(name: str, x: object, choices: Collection[str], instead: str = "") -> None:
    if not isinstance(x, str):
        raise TypeError(f"{name} must be {instead}a string, got {_brief(x)}")
    if x not in choices:
        raise ValueError(f"{name} must be {instead}one of {', '.join(choices)}, got {x!r}")


def _brief(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a {x.dtype} tensor of shape {list(x.shape)}"
    text = repr(x)
    return f"{type(x).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
