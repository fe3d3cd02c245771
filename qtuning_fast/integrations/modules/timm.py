"""timm's attention with a gated prefix. This module never imports timm; it uses timm if it is loaded."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from qtuning_fast.integrations.modules.prefixed import PrefixedAttention

_HOMES = ("timm.layers.attention", "timm.models.vision_transformer")  # newer and older versions
_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


def attention_class() -> type[nn.Module] | None:
    """Return timm's `Attention`, or None if timm is not loaded."""
    for home in _HOMES:
        found = getattr(sys.modules.get(home), "Attention", None)
        if found is not None:
            return found
    return None


class PrefixTimmAttention(PrefixedAttention):
    """timm's `Attention`, as its vision transformers use it, with a prefix. `convert_` makes one from a plain module.

    The prefix's keys join the keys that `k_norm` returns. In training mode `attn_drop` applies to the weights of prefix
    and context, on a slower path.
    """

    num_heads: int
    head_dim: int
    scale: float
    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    proj: nn.Module
    proj_drop: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map `[B, N, dim]` to `[B, N, dim_out]`.

        Args:
            attn_mask: bool (True: attend) or added to the scores, broadcastable to `[B, H, N, N]`.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B, H, N, D] each
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # under autocast norms return float32
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        output, _ = self.attend(
            q,
            k,
            v,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=self.scale,
            dropout=self.attn_drop.p if self.training else 0.0,
        )
        output = output.transpose(1, 2).flatten(2)
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)  # absent in older versions
        if norm is not None:
            output = norm(output)
        if gate is not None:
            output = output * gate(x).sigmoid()
        return self.proj_drop(self.proj(output))

    @classmethod
    def check_convertible(cls, module: nn.Module) -> None:
        unknown = {name for name, _ in module.named_children()} - _PARTS
        if unknown:  # forward would skip them
            raise NotImplementedError(f"timm's Attention has parts unknown to PrefixTimmAttention: {sorted(unknown)}")

    def _prefix_shape(self) -> tuple[int, int]:
        return self.num_heads, self.head_dim

    def _prefix_like(self) -> Tensor:
        weight = self.proj.weight
        assert isinstance(weight, Tensor)
        return weight
