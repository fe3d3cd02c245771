"""Prefix attention as transformers' attention and mask functions, without patching any forward.

A model with `attn_implementation="qtuning_fast"` computes its attention here. It has no prefix until one is placed on
its attention layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface

from qtuning_fast.attention.api import prefix_attention
from qtuning_fast.integrations.transformers.masks import Packed, seen
from qtuning_fast.integrations.transformers.masks import attention_mask as mask_for
from qtuning_fast.method.prefix import no_prefix, placed

NAME = "qtuning_fast"

Arguments = Mapping[str, Any]

_CHANGES_MASKS = {"deepseek_v4", "doge", "hy_v4"}


class AttentionCall(NamedTuple):
    """A call of the attention function: its module, query, key and value, and whether it is causal."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool


Watcher = Callable[[AttentionCall], None]

_WATCHER = "qtuning_watcher"  # also an attribute, because torch.compile does not follow context variables


@contextmanager
def watched(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Within the block, call `watcher` for every call of the attention function."""
    modules = list(model.modules())
    for module in modules:
        setattr(module, _WATCHER, watcher)
    try:
        yield
    finally:
        if torch.compiler.is_dynamo_compiling():  # PyTorch 2.11 reads no deleted attribute
            for module in modules:
                setattr(module, _WATCHER, None)
        else:
            forget_watchers(model)


def forget_watchers(model: nn.Module) -> None:
    """Remove what `watched` leaves on modules, also in compiled code."""
    for module in model.modules():
        module.__dict__.pop(_WATCHER, None)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: query `[B, Hq, N, D]` to output `[B, N, Hq, Dv]`, without weights.

    Args:
        attention_mask: as `masks.attention_mask` returns it.
        position_bias: T5's relative bias, `[1 or B, Hq, N, M]`.
        kwargs: among others `softcap` and `s_aux`, attention sinks `[Hq]`.

    Raises:
        ValueError: attention dropout or attention weights are requested.
        NotImplementedError: each token has its own attention sinks, each query its own blocks of keys, the model
            changes masks on their way here, or packed rows have a relative bias.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "output_attentions=True: fused attention never forms the weights; use attn_implementation='eager'"
        )
    if dropout:
        raise ValueError(f"dropout is {dropout}: prefix attention has no dropout; put the model in eval mode")
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    watcher: Watcher | None = getattr(module, _WATCHER, None)
    if watcher is not None:
        watcher(AttentionCall(module, query, key, value, causal))
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if kind in _CHANGES_MASKS:
        raise NotImplementedError(f"{kind} changes the additive masks of eager attention on their way to its layers")
    if kwargs.get("sinks") is not None:
        raise NotImplementedError(f"attention sinks of each token (sinks): {type(module).__name__} has them")
    if kwargs.get("block_indices") is not None:
        raise NotImplementedError(f"a choice of blocks of keys (block_indices): {type(module).__name__} makes one")
    padding, mask, reach, packed = seen(attention_mask, key)
    if packed is not None and position_bias is not None:
        raise NotImplementedError(f"packed rows with a relative bias: {type(module).__name__} has one")
    sink: Tensor | None = kwargs.get("s_aux")
    options = {
        "is_causal": packed is not None or (causal and mask is None),  # otherwise the mask includes it
        "window": None if reach is None else (reach, reach),
        "scale": scaling,
        "softcap": kwargs.get("softcap"),
        "sink": sink if sink is None or sink.dtype == value.dtype else sink.float(),
    }
    if position_bias is not None and not any(parameter.requires_grad for parameter in module.parameters()):
        position_bias = position_bias.detach()  # a reentrant checkpoint makes it require a gradient, which is not used
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings make them float32
    call = _Call(query, key, value, padding, mask, position_bias, options, packed)
    prefix = placed(module)
    if prefix is None:
        output = call.with_prefix(no_prefix(call.key, call.value))
    elif "prompt_tokens" in prefix:
        output = _attend_behind_prompt(call, **_fitting(prefix, query))
    else:
        output = call.with_prefix(_fitting(prefix, query))
    return output.transpose(1, 2), None


@dataclass(frozen=True)
class _Call:
    """A layer's attention call; each part of it (some queries, some keys) can be computed with its own prefix."""

    query: Tensor
    key: Tensor
    value: Tensor
    padding: Tensor | None  # [B, M]
    mask: Tensor | None  # [B, 1 or H, N, M]
    bias: Tensor | None
    options: dict[str, Any]
    packed: Packed | None

    def with_prefix(self, prefix: Arguments, *, queries: slice | None = None, keys: slice | None = None) -> Tensor:
        """Return the output `[B, Hq, n, Dv]` of these queries over the prefix and these keys."""
        if self.packed is not None:
            assert queries is keys is None
            return self._packed_with_prefix(prefix)
        call = self if queries is keys is None else self._part(queries or slice(None), keys or slice(None))
        output = prefix_attention(
            call.query,
            call.key,
            call.value,
            **prefix,
            padding_mask=call.padding,
            attn_mask=_with_bias(call.mask, call.bias),
            **self.options,
        )
        assert isinstance(output, Tensor)
        return output

    def _part(self, queries: slice, keys: slice) -> _Call:
        """Return the call of some queries and keys."""
        mask, bias = (None if x is None else x[:, :, queries, keys] for x in (self.mask, self.bias))
        padding = None if self.padding is None else self.padding[:, keys]
        query, key, value = self.query[:, :, queries], self.key[:, :, keys], self.value[:, :, keys]
        return replace(self, query=query, key=key, value=value, padding=padding, mask=mask, bias=bias)

    def _packed_with_prefix(self, prefix: Arguments) -> Tensor:
        """Return the output of packed rows, all sequences in one row."""
        assert self.packed is not None
        (B, _, N, _), (offsets, longest) = self.query.shape, self.packed
        query, key, value = (_in_one_row(x) for x in (self.query, self.key, self.value))
        prefix = dict(prefix)
        if "prefix_index" in prefix:
            prefix["prefix_index"] = prefix["prefix_index"][offsets[:-1] // N]  # each sequence's is that of its row
        output = prefix_attention(
            query,
            key,
            value,
            **prefix,
            cu_seqlens_query=offsets,
            max_seqlen_query=longest,
            max_seqlen_key=longest,
            **self.options,
        )
        assert isinstance(output, Tensor)
        return output[0].unflatten(1, (B, N)).transpose(0, 1)


def _in_one_row(x: Tensor) -> Tensor:
    """Return the rows of a batch `[B, H, N, D]` behind one another, `[1, H, B N, D]`."""
    return x if x.shape[0] == 1 else x.transpose(0, 1).flatten(1, 2)[None]


def _attend_behind_prompt(
    call: _Call,
    prompt_tokens: int,
    prefix_index: Tensor | None = None,
    prefix_length: Tensor | None = None,
    **gate: Any,
) -> Tensor:
    """Attend with a prompt as the first tokens: the others see it through the gate, its own queries are not gated.

    Each sample's prompt has passed through the layers below, so each sample has its own prefix.
    """
    assert call.packed is None, "prompts stand in front in bidirectional stacks, whose rows are never packed"
    in_front, behind = slice(prompt_tokens), slice(prompt_tokens, None)
    bias = None if call.bias is None else call.bias[:, :, behind, in_front]
    if prefix_index is not None:  # from one for each task to one for each sample
        gate |= {name: x[prefix_index] for name, x in gate.items() if isinstance(x, Tensor) and x.ndim == 2}
        if prefix_length is not None:  # shorter prompts fill the last rows
            there = (
                torch.arange(prompt_tokens, device=call.key.device) >= prompt_tokens - prefix_length[prefix_index, None]
            )
            hidden = call.query.new_zeros(1, 1, 1, prompt_tokens) if bias is None else bias
            bias = _with_bias(there[:, None, None], hidden)
            there = F.pad(there, (0, call.key.shape[2] - prompt_tokens), value=True)
            call = replace(call, padding=there if call.padding is None else call.padding & there)
    prefix = gate | {
        "prefix_key": call.key[:, :, in_front],
        "prefix_value": call.value[:, :, in_front],
        "prefix_index": torch.arange(call.key.shape[0], device=call.key.device),
        "prefix_bias": bias,
    }
    prompt = _of_first(call, prompt_tokens).with_prefix(no_prefix(call.key, call.value), queries=in_front)
    return torch.cat([prompt, call.with_prefix(prefix, queries=behind, keys=behind)], dim=2)


def _of_first(call: _Call, count: int) -> _Call:
    """Return the call with its window as a mask on the first queries, which do not stand where the last ones would."""
    if call.options["window"] is None:
        return call
    reach, _ = call.options["window"]
    near = torch.ones(1, 1, count, call.key.shape[2], dtype=torch.bool, device=call.query.device)
    return replace(call, mask=near.triu(-reach).tril(reach), options=call.options | {"window": None})


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Combine mask and relative bias into one `attn_mask`."""
    if mask is None or bias is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _fitting(prefix: Arguments, query: Tensor) -> dict[str, Any]:
    """Return the prefix on query's device, with an index for each of its samples.

    Layers of one model may be on several devices. Beams and several answers to one input repeat each sample.
    """
    fitting = dict(prefix)
    pairs = [x if isinstance(x, (tuple, list)) else (x,) for x in fitting.values()]
    if any(isinstance(x, Tensor) and x.device != query.device for pair in pairs for x in pair):
        fitting = tree_map_only(Tensor, lambda x: x.to(query.device), fitting)
    if "prefix_index" in fitting:
        fitting["prefix_index"] = for_batch(fitting["prefix_index"], query.shape[0])
    return fitting


def for_batch(each: Tensor, batch: int) -> Tensor:
    """Repeat `[B, ...]` for a batch in which each sample may occur several times in a row.

    Raises:
        ValueError: the batch size is not a multiple of B.
    """
    named = each.shape[0]  # len() would fix the size where a graph is traced
    if batch % named:
        raise ValueError(f"the batch has {batch} samples, but tasks were named for {named}")
    return each if named == batch else each.repeat_interleave(batch // named, dim=0)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask_for)
