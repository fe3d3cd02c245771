"""One call of prefix attention, checked: what validation makes of the arguments and every backend takes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PrefixAttentionCall:
    """The arguments of `prefix_attention`, known to be right and with their defaults filled in.

    Sizes: `B` batch, `N` queries, `M` context keys, `P` prefix rows, `Hq` and `Hkv` heads, `T` prefixes in a bank,
    `R` rank. What belongs to the prefix (rows, reweighting, gate) is of query's dtype or float32.
    """

    query: Tensor  # [B, Hq, N, D]
    key: Tensor  # [B, Hkv, M, D], query's dtype
    value: Tensor  # [B, Hkv, M, Dv], query's dtype
    prefix_key: Tensor  # [Hkv, P, D], a bank: [T, Hkv, P, D]
    prefix_value: Tensor  # [Hkv, P, Dv], a bank: [T, Hkv, P, Dv]
    prefix_index: Tensor | None  # [B] integers, exactly with a bank; beyond [0, T) only on an accelerator: clamp
    prefix_length: Tensor | None  # [T] integers, only with a bank; None: P for all
    n_shared: int  # the first rows, not reweighted
    reweight_key: tuple[Tensor, Tensor] | None  # U [P, R], V [R, Hkv, D], a bank: with a leading T
    reweight_value: tuple[Tensor, Tensor] | None  # U [P, R], V [R, Hkv, Dv], a bank: with a leading T
    gate: str | None  # a name in reference.GATES, or None: no gate, and gate_alpha and gate_tau mean nothing
    gate_alpha: float | Tensor  # a tensor: [] or [Hq], with a bank also [T, 1] or [T, Hq]
    gate_tau: float | Tensor  # like gate_alpha, but not necessarily of its shape
    padding_mask: Tensor | None  # [B, M], bool or additive; excludes attn_mask
    attn_mask: Tensor | None  # 4-D, each dimension of [B, Hq, N, M] or 1, bool or additive
    prefix_bias: Tensor | None  # 4-D, each dimension of [B, Hq, N, P] or 1, additive
    is_causal: bool  # bottom-right: query i sees context key j when j <= i + M - N
    scale: float
    softcap: float | None  # positive: scores are capped, softly, before gate and masks
