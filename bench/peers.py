"""The peers: ways to compute prefix attention, or attention without the gate.

A peer is a function of a call. Reweighting the prefix, expanding it over the batch and putting it in front of the
context are inside the timing, unless the name of the peer says otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtuning_fast import prefix_attention
from qtuning_fast.bench import eager, flex, sdpa
from qtuning_fast.bench.shapes import Inputs, PrefixAttentionCall, Shape

Attend = Callable[[PrefixAttentionCall], Tensor]
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A peer with a set of inputs."""

    forward: Callable[[], Tensor]  # -> the output [B, Hq, N, D]
    leaves: dict[str, Tensor]  # what gets a gradient
    as_trained: Callable[[Gradients], Gradients] = lambda gradients: gradients  # by the names of Inputs.trained

    def step(self, d_output: Tensor) -> tuple[Tensor, ...]:
        """Forward and backward."""
        return torch.autograd.grad(self.forward(), list(self.leaves.values()), d_output)


@dataclass(frozen=True)
class Peer:
    """One way to do the work, or part of it."""

    about: str
    attend: Attend
    gated: bool = True
    reweighted: bool = True
    has_prefix: bool = True
    frozen: tuple[str, ...] = ()  # names of Inputs.trained that get no gradient
    lacks: tuple[str, ...] = ()  # features of a Shape that it cannot do

    def check(self, shape: Shape) -> None:
        """Raises a NotImplementedError if the peer lacks a feature of the shape."""
        lacking = [name for name in self.lacks if getattr(shape, name)]
        if lacking:
            raise NotImplementedError(f"not with {', '.join(lacking)}")

    def prepare(self, shape: Shape, x: Inputs) -> Prepared:
        self.check(shape)
        which = {"gated": self.gated, "reweighted": self.reweighted}
        x = replace(x, **{name: getattr(x, name).detach() for name in self.frozen})
        leaves = {name: t for name, t in x.trained(**which).items() if name not in self.frozen}
        if not self.has_prefix:
            leaves = {name: leaves[name] for name in ("query", "key", "value")}
        return Prepared(partial(self.attend, x.call(shape, **which)), leaves)

    @property
    def trains(self) -> str:
        """What gets a gradient in a step, for tables whose rows do not all train the same."""
        if not self.has_prefix:
            return "query, key and value"
        parts = ["query, key, value"] if "query" not in self.frozen else []
        parts += ["prefix"] + ["U, V"] * self.reweighted
        parts += ["alpha, tau"] * (self.gated and "gate_alpha" not in self.frozen)
        return ", ".join(parts)


CONTEXT, GATE = ("query", "key", "value"), ("gate_alpha", "gate_tau")


@dataclass(frozen=True)
class Concatenated(Peer):
    """A peer for which the stored prefix already stands in front of the context: only attention is timed."""

    attention: sdpa.Attention = sdpa.pytorch

    def prepare(self, shape: Shape, x: Inputs) -> Prepared:
        self.check(shape)
        call = x.call(shape, gated=False, reweighted=False)
        with torch.no_grad():
            key, value = (t.requires_grad_(x.key.requires_grad) for t in eager.concatenated(call))

        def as_trained(gradients: Gradients) -> Gradients:
            found = {"query": gradients["query"]}
            for name in ("key", "value"):
                rows, found[name] = gradients[name].split([shape.P, shape.M], dim=2)
                found[f"prefix_{name}"] = self._of_prefix(call, rows.float())
            return found

        leaves = {"query": x.query, "key": key, "value": value}
        return Prepared(lambda: self.attention(call, key, value), leaves, as_trained)

    @staticmethod
    def _of_prefix(call: PrefixAttentionCall, rows: Tensor) -> Tensor:
        """The sum over the samples that use a prefix."""
        if call.prefix_index is None:
            return rows.sum(0)
        return torch.zeros_like(call.prefix_key, dtype=rows.dtype).index_add(0, call.prefix_index, rows)


AS_THEY_ARE = (  # arguments of prefix_attention that a call holds by the same name
    *("query", "key", "value", "prefix_key", "prefix_value", "prefix_index", "prefix_length", "n_shared"),
    *("reweight_key", "reweight_value", "gate", "attn_mask", "padding_mask", "prefix_bias", "is_causal", "scale"),
    *("softcap", "sink", "cu_seqlens_query", "cu_seqlens_key", "max_seqlen_query", "max_seqlen_key"),
)


def own(backend: str, call: PrefixAttentionCall) -> Tensor:
    """This library's operator, called as users call it."""
    arguments = {name: getattr(call, name) for name in AS_THEY_ARE}
    window = call.window_left, call.window_right
    return prefix_attention(**arguments, gate_alpha=call.alpha, gate_tau=call.tau, window=window, backend=backend)


_NEITHER: dict[str, Any] = {"gated": False, "reweighted": False}
_ALONE: dict[str, Any] = _NEITHER | {"has_prefix": False, "lacks": ("window", "softcap", "packed")}


def variants(backend: str, about: str) -> dict[str, Peer]:
    """One of our backends, with everything and without some parts."""
    attend = partial(own, backend)
    found = {
        backend: Peer(about, attend),
        f"{backend}-again": Peer("the same a second time: how far two measurements of one thing differ", attend),
        f"{backend}-no-gate": Peer("without gate", attend, gated=False),
        f"{backend}-no-reweighting": Peer("without reweighting", attend, reweighted=False),
        f"{backend}-plain": Peer("without either", attend, **_NEITHER),
        f"{backend}-frozen-gate": Peer("alpha and tau frozen, all else trained", attend, frozen=GATE),
        f"{backend}-prefix-only": Peer("query, key and value frozen, as in the lowest layer", attend, frozen=CONTEXT),
    }
    lacks = ("softcap",) if backend == "composed" else ()
    return {name: replace(peer, lacks=lacks) for name, peer in found.items()}


PEERS: dict[str, Peer] = {
    **variants("fused", "our Triton kernels"),
    **variants("native", "our C++ kernels for the CPU"),
    **variants("composed", "a vendor's attention for the context, ours for the prefix"),
    "reference": Peer("the definition, in plain PyTorch, float32 inside", partial(own, "reference")),
    "eager": Peer("as the papers' authors would write it", eager.attend, lacks=("packed",)),
    "eager-compiled": Peer(
        "the same under torch.compile", lambda call: flex.compiled(eager.attend)(call), lacks=("packed",)
    ),
    # The gradient of what a score_mod captures takes one atomic addition a score, which alone makes "flex" slow. The
    # peer to beat has its gate frozen, and is compared with our kernels with the gate frozen.
    "flex-frozen-gate": Peer("FlexAttention, compiled, the gate as its score_mod", flex.ATTENDS["flex"], frozen=GATE),
    "flex-approx-frozen-gate": Peer("with the GPU's own tanh", flex.ATTENDS["flex-tanh-approx"], frozen=GATE),
    "flex": Peer("with alpha and tau trained, by one atomic addition a score", flex.ATTENDS["flex"]),
    "flex-merged": Peer(
        "FlexAttention over the context, the prefix by hand", flex.ATTENDS["flex-merged"], lacks=("softcap", "packed")
    ),
    "flex-flash": Peer("FlexAttention's FlashAttention backend", flex.ATTENDS["flex-flash"]),
    "context-alone": Peer("no prefix", partial(sdpa.context_alone, None), **_ALONE),
    "context-alone-cudnn": Peer("by cuDNN", partial(sdpa.context_alone, "cudnn"), **_ALONE),
}
for _name, _attention in sdpa.ATTENTIONS.items():
    _by, _attend = "PyTorch's attention" if _name == "sdpa" else _name, partial(sdpa.attend, _attention)
    _lacks = ("softcap", "packed", "window") if "flash-attn" in _name else ("softcap", "packed")
    PEERS[_name] = Peer(f"{_by} on the concatenated prefix, no gate", _attend, gated=False, lacks=_lacks)
    PEERS[f"{_name}-no-concat"] = Concatenated(
        f"{_by}, the prefix in place", _attend, **_NEITHER, lacks=_lacks, attention=_attention
    )
OURS = ("fused", "native", "composed")
