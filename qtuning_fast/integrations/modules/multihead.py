"""`torch.nn.MultiheadAttention` with a gated prefix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtuning_fast.attention.arguments import PrefixArguments
from qtuning_fast.integrations.modules.prefixed import PrefixedAttention, check_prefix


class PrefixMultiheadAttention(PrefixedAttention, nn.MultiheadAttention):
    """A drop-in replacement for `torch.nn.MultiheadAttention` that also attends to a gated prefix, its own or another.

    Constructor, forward and state dict are the same, and without a prefix so are the results. With a prefix, each
    query's softmax covers prefix and context together (NoRGa: Le et al., arXiv 2405.14124, section 4), and no mask
    covers the prefix. A plain module's state dict loads with `strict=False`; only the prefix is missing then.

    Differences from the plain module:

    - A query whose whole context is masked attends to the prefix alone. Without a prefix, its attention before the
      output projection is 0, where the plain module may return NaN. Mask entries at or below their dtype's most
      negative finite number count as -inf.
    - The fast paths of `nn.TransformerEncoderLayer` and `nn.TransformerEncoder`, which bypass this module, are never
      taken, and nested tensors are refused. (A new `nn.TransformerEncoder` warns about this unless it is made with
      `enable_nested_tensor=False`.)
    - Attention weights, dropout in training mode and masks that require a gradient take a path in plain PyTorch that
      forms all weights. For speed, use `need_weights=False`, and eval mode or `dropout=0`.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            `nn.MultiheadAttention`. Dropout applies to the weights of prefix and context.
        prefix_length: rows P of the module's own prefix; 0: neither a prefix nor a gate.
        gate: σ of `g(s) = s + α·σ(τ·s)`, a name that `prefix_attention` takes; None for plain prefix attention.
        gate_per: one (α, τ) pair for the `"layer"` or for each `"head"`.

    Attributes:
        prefix_key, prefix_value: `[num_heads, P, head_dim]`, initially drawn from N(0, 0.5²) and N(0, 0.02²); None if
            P is 0.
        prefix_gate: a `Gate`, or None.

    Raises:
        TypeError, ValueError: an argument of the prefix is wrong. Others raise what `nn.MultiheadAttention` raises.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        prefix_length: int = 0,
        gate: str | None = "tanh",
        gate_per: str = "layer",
    ) -> None:
        check_prefix(prefix_length, gate, gate_per)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._begin_prefix(prefix_length, gate, gate_per)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        prefix: PrefixArguments | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute projected attention over the prefix and the context.

        Args:
            query: `[L, B, embed_dim]`, with `batch_first` `[B, L, embed_dim]`, unbatched `[L, embed_dim]`.
            key: `[S, B, kdim]`, `[B, S, kdim]` or `[S, kdim]`, likewise.
            value: `[S, B, vdim]`, `[B, S, vdim]` or `[S, vdim]`, likewise.
            key_padding_mask: `[B, S]`, unbatched `[S]`: bool (True: not attended to) or added to the scores.
            need_weights: also return the weights, on a slower path.
            attn_mask: `[L, S]` or `[B * num_heads, L, S]`, bool (True: not attended to) or added to the scores.
            average_attn_weights: return the mean of the weights over heads instead of each head's.
            is_causal: a hint that `attn_mask` is the causal mask. It is trusted if L = S.
            prefix: prefix for this call instead of the module's own or the placed one; see `place`.

        Returns:
            The output, shaped as query, and with `need_weights` the weights over the context's keys, `[B, L, S]` or,
            per head, `[B, num_heads, L, S]` (unbatched: without B), otherwise None. S includes the keys that
            `add_bias_kv` and `add_zero_attn` add. 1 minus the sum of a query's weights is the share of the prefix.

        Raises:
            TypeError, ValueError: an argument is wrong; the message says which, what it must be and what it was.
        """
        self._check_inputs(query, key, value)
        self._check_masks(query, key, key_padding_mask, attn_mask, is_causal)
        batched = query.ndim == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))

        # The operator's causality, aligned bottom-right, equals the hint's if L = S and no keys are added.
        causal = is_causal and q.shape[1] == k.shape[1] and self.bias_k is None and not self.add_zero_attn
        padding, mask = self._context_masks(key_padding_mask, None if causal else attn_mask, len(q))
        k, v, padding, mask = self._with_added_keys(k, v, padding, mask)
        output, weights = self.attend(
            self._by_head(q),
            self._by_head(k),
            self._by_head(v),
            attn_mask=padding if mask is None else mask,  # padding alone may be learned
            padding_mask=None if mask is None else padding,
            is_causal=causal,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            prefix=prefix,
        )
        output = output.transpose(1, 2)  # [B, L, H, D]
        if batched and not self.batch_first:
            output = output.transpose(0, 1)
        output = self.out_proj(output.flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return the three projections; self-attention needs only one product."""
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        packed = self.in_proj_weight is not None
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = self.in_proj_weight.chunk(3) if packed else separate
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in zip((query, key, value), weights, biases))

    def _with_added_keys(
        self, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Append the keys of `add_bias_kv` and `add_zero_attn`, which neither mask covers."""
        B, S, E = k.shape
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(B, 1, E)], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(B, 1, E)], dim=1)
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(B, 1, E)], dim=1) for x in (k, v))
        added = k.shape[1] - S
        padding, mask = (
            x if x is None or not added else F.pad(x, (0, added), value=x.dtype == torch.bool) for x in (padding, mask)
        )
        return k, v, padding, mask

    def _context_masks(
        self, key_padding_mask: Tensor | None, attn_mask: Tensor | None, B: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return both masks in the operator's form: `[B, S]` and 4-D, True where a query attends."""
        padding, mask = key_padding_mask, attn_mask
        if mask is not None:
            mask = mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (B, self.num_heads))
            if padding is not None and padding.requires_grad:  # the operator's padding mask gets no gradient
                mask = _added(mask, padding[:, None, None, :])
                padding = None
        padding, mask = (~x if x is not None and x.dtype == torch.bool else x for x in (padding, mask))
        return padding, mask

    def _by_head(self, x: Tensor) -> Tensor:
        """Reshape `[B, L, embed_dim]` to `[B, H, L, D]`."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        inputs = {"query": query, "key": key, "value": value}
        for (name, x), size in zip(inputs.items(), (self.embed_dim, self.kdim, self.vdim)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got a {type(x).__name__}")
            if x.is_nested:
                raise TypeError(
                    f"{name} must not be a nested tensor; inside an nn.TransformerEncoder, set its "
                    "use_nested_tensor to False"
                )
            if x.ndim not in (2, 3) or x.ndim != query.ndim or x.shape[-1] != size:
                kind = "2-D or 3-D" if x is query else f"{query.ndim}-D as query is,"
                raise ValueError(f"{name} must be {kind} with {size} features, got shape {list(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"value must be as long as key, got shapes {list(key.shape)} and {list(value.shape)}")
        batch = 0 if self.batch_first else 1
        if query.ndim == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(
                f"key must have query's batch size in dimension {batch}, as batch_first is {self.batch_first}, "
                f"got shapes {list(query.shape)} and {list(key.shape)}"
            )

    def _check_masks(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> None:
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be the causal mask if is_causal=True, got None")
        time, batch = (0, 1) if query.ndim == 2 or not self.batch_first else (1, 0)
        L, S, B = query.shape[time], key.shape[time], () if query.ndim == 2 else (query.shape[batch],)
        shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
            "key_padding_mask": (key_padding_mask, [(*B, S)]),
            "attn_mask": (attn_mask, [(L, S), (math.prod(B) * self.num_heads, L, S)]),
        }
        for name, (mask, allowed) in shapes.items():
            if mask is None:
                continue
            if not isinstance(mask, Tensor) or (mask.dtype != torch.bool and not mask.is_floating_point()):
                raise TypeError(f"{name} must be a bool or floating tensor, got {getattr(mask, 'dtype', type(mask))}")
            if mask.shape not in allowed:
                one = " or ".join(str(list(shape)) for shape in allowed)
                raise ValueError(f"{name} must have shape {one}, got {list(mask.shape)}")

    def _begin_prefix(self, length: int, gate: str | None, gate_per: str) -> None:
        super()._begin_prefix(length, gate, gate_per)
        # If True, layers and stacks of nn.TransformerEncoder compute inference from the weights without calling this
        # module. Nothing else reads it once the parameters exist.
        self._qkv_same_embed_dim = False

    def revert_(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super().revert_()

    def _prefix_shape(self) -> tuple[int, int]:
        return self.num_heads, self.head_dim

    def _prefix_like(self) -> Tensor:
        return self.out_proj.weight


def _added(mask: Tensor, padding: Tensor) -> Tensor:
    """Add two masks, of which at least one is additive; the other may be bool, True where no query attends."""
    dtype = padding.dtype if mask.dtype == torch.bool else mask.dtype
    first, second = (
        torch.zeros_like(x, dtype=dtype).masked_fill(x, -torch.inf) if x.dtype == torch.bool else x
        for x in (mask, padding)
    )
    return first + second
