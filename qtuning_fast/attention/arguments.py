"""The arguments of prefix attention: one dataclass lists them; their checks, schema and order derive from it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypedDict, get_args

import torch
from torch import Tensor

from qtuning_fast.attention import checks
from qtuning_fast.attention.checks import Known, Spec, brief


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

    query: Annotated[Tensor, checks.tensor("B Hq N D", "a floating")]
    key: Annotated[Tensor, Spec(checks.key, differentiable=True)]  # [B, Hkv, M, D]
    value: Annotated[Tensor, checks.tensor("B Hkv M Dv", "query's")]
    prefix_key: Annotated[Tensor, checks.tensor("T Hkv P D", "query's or float32")]
    prefix_value: Annotated[Tensor, checks.tensor("T Hkv P Dv", "query's or float32")]
    U_key: Annotated[Tensor | None, checks.weights("key", "T P R")]
    V_key: Annotated[Tensor | None, checks.weights("key", "T R Hkv D")]
    U_value: Annotated[Tensor | None, checks.weights("value", "T P R")]
    V_value: Annotated[Tensor | None, checks.weights("value", "T R Hkv Dv")]
    gate_alpha: Annotated[Tensor | None, checks.gate_parameter()]  # [], [Hq] or, with a bank, [T, 1] or [T, Hq]
    gate_tau: Annotated[Tensor | None, checks.gate_parameter()]  # like gate_alpha; the two shapes may differ
    sink: Annotated[Tensor | None, Spec(checks.sink, differentiable=True)]  # [Hq], one more score in each softmax
    number_alpha: Annotated[float, Spec(checks.gate_number)]  # used if gate_alpha is None
    number_tau: Annotated[float, Spec(checks.gate_number)]
    cu_seqlens_query: Annotated[Tensor | None, Spec(checks.query_offsets)]  # [S + 1]: packed sequences in rows 0..N
    cu_seqlens_key: Annotated[Tensor | None, Spec(checks.key_offsets)]  # likewise; None: as query has them
    max_seqlen_query: Annotated[int | None, checks.longest("N")]  # of the longest, or more; None: none is packed
    max_seqlen_key: Annotated[int | None, checks.longest("M")]
    prefix_index: Annotated[Tensor | None, checks.of_a_bank("B", lambda known: known["T"] - 1)]  # checked on the CPU
    prefix_length: Annotated[Tensor | None, checks.of_a_bank("T", lambda known: known["P"])]  # None: P for all
    padding_mask: Annotated[Tensor | None, checks.overlay("B M", "a floating or bool")]
    attn_mask: Annotated[Tensor | None, checks.overlay("B Hq N M", "a floating or bool")]  # 4-D, any dimension may be 1
    prefix_bias: Annotated[Tensor | None, checks.overlay("B Hq N P", "a floating")]  # likewise
    n_shared: Annotated[int, Spec(checks.n_shared)]  # number of leading rows that are not reweighted
    gate: Annotated[str | None, Spec(checks.gate)]  # None: alpha and tau are ignored
    is_causal: Annotated[bool, Spec(checks.flag)]  # bottom-right: query i sees context key j when j <= i + M - N
    window_left: Annotated[int | None, checks.reach(0)]  # query i sees context key j when j >= i + M - N - window_left
    window_right: Annotated[int | None, checks.reach(1)]  # and when j <= i + M - N + window_right
    scale: Annotated[float, Spec(checks.scale)]
    softcap: Annotated[float | None, Spec(checks.softcap)]  # soft cap on scores, before gate and masks

    @property
    def is_packed(self) -> bool:
        """Whether query, key and value hold packed sequences."""
        return self.cu_seqlens_query is not None

    @property
    def counts(self) -> tuple[int, int, int]:
        """B, N and M; of packed sequences their number and the rows of the longest."""
        if self.cu_seqlens_query is None:
            return self.query.shape[0], self.query.shape[2], self.key.shape[2]
        assert self.max_seqlen_query is not None and self.max_seqlen_key is not None
        return self.cu_seqlens_query.shape[0] - 1, self.max_seqlen_query, self.max_seqlen_key

    @property
    def key_offsets(self) -> Tensor | None:
        """Where packed sequences begin and end in key and value; None: none is packed."""
        return self.cu_seqlens_query if self.cu_seqlens_key is None else self.cu_seqlens_key

    @property
    def has_additive_masks(self) -> bool:
        """Whether masks or a bias add numbers to scores."""
        overlays = (self.padding_mask, self.attn_mask, self.prefix_bias)
        return any(x is not None and x.dtype != torch.bool for x in overlays)

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
CONTEXT = ("query", "key", "value")  # those of INPUTS that get a gradient from the context
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
    known = Known(given["query"], given["prefix_key"])
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
        raise TypeError(f"window must be None or a pair (left, right), got {brief(pair)}")
    return pair[0], pair[1]


def _tensor_or_number(x: object) -> tuple[Tensor | None, object]:
    return (x, 1.0) if isinstance(x, Tensor) else (None, x)


def _pair(name: str, pair: object) -> tuple[Any, Any]:
    """Return U and V of a reweighting W = U V, or None twice."""
    if pair is None:
        return None, None
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name} must be None or a pair of tensors (U, V), got {brief(pair)}")
    for index, x in enumerate(pair):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{index}] must be a tensor, got {brief(x)}")
    return pair[0], pair[1]
