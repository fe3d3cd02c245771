"""Ways to compute prefix attention, and what is left of it without the gate: the peers of `bench.attention`.

Each prepares a set of inputs and returns what is then called, and timed, again and again. What a peer does beside
attention (reweighting the prefix, expanding it over the batch, putting it before the context) is inside the timing,
unless its name says otherwise. What FlexAttention needs is compiled with it, so that its extra work is fused as well.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from qtuning_fast import prefix_attention
from qtuning_fast.bench.shapes import N_SHARED, Inputs, Shape
from qtuning_fast.bench.tanh_approx import lower_to_ptx, tanh_approx

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
    prepare: Callable[[Shape, Inputs], Prepared]
    gated: bool = True
    reweighted: bool = True


def operator(backend: str, x: Inputs, shape: Shape, *, gated: bool = True, reweighted: bool = True) -> Tensor:
    """This library's own."""
    return prefix_attention(
        x.query,
        x.key,
        x.value,
        x.prefix_key,
        x.prefix_value,
        n_shared=n_shared(shape),
        reweight_key=(x.U_key, x.V_key) if reweighted else None,
        reweight_value=(x.U_value, x.V_value) if reweighted else None,
        gate="tanh" if gated else None,
        gate_alpha=x.gate_alpha if gated else 1.0,
        gate_tau=x.gate_tau if gated else 1.0,
        is_causal=shape.is_causal,
        backend=backend,
    )


def leaves(x: Inputs, *, gated: bool = True, reweighted: bool = True) -> dict[str, Tensor]:
    """What is trained when there is no gate, or no reweighting."""
    kept = {"U", "V"} if reweighted else set()
    kept |= {"gate"} if gated else set()
    return {n: t for n, t in x.trained().items() if n.split("_")[0] in kept | {"query", "key", "value", "prefix"}}


def n_shared(shape: Shape) -> int:
    return min(N_SHARED, shape.P)


def _own(backend: str, gated: bool, reweighted: bool) -> Peer:
    def prepare(shape: Shape, x: Inputs) -> Prepared:
        which = {"gated": gated, "reweighted": reweighted}
        return Prepared(lambda: operator(backend, x, shape, **which), leaves(x, **which))

    return Peer(prepare, gated, reweighted)


def fused_prefix_only(shape: Shape, x: Inputs) -> Prepared:
    """As in the lowest layer with a prefix of a frozen model: query, key and value need no gradient."""
    frozen = {name: getattr(x, name).detach() for name in ("query", "key", "value")}
    x = replace(x, **frozen)
    trained = {name: leaf for name, leaf in x.trained().items() if name not in frozen}
    return Prepared(lambda: operator("fused", x, shape), trained)


# Pieces in plain PyTorch


def prefix_rows(rows: Tensor, U: Tensor, V: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """The reweighted rows [Hkv, P, D], computed in their own precision and rounded once."""
    W = (U.mT[:, None, :, None] * V[:, :, None, :]).sum(0)
    is_shared = torch.arange(rows.shape[1], device=rows.device)[:, None] < shared
    return torch.where(is_shared, rows, W * rows).to(dtype)


def in_front(rows: Tensor, context: Tensor) -> Tensor:
    """[B, Hkv, P + M, D]: the prefix's rows [Hkv, P, D] in front of every sample's."""
    return torch.cat([rows.expand(context.shape[0], -1, -1, -1), context], dim=2)


def concatenated(x: Inputs, shared: int) -> tuple[Tensor, Tensor]:
    dtype = x.query.dtype
    return (
        in_front(prefix_rows(x.prefix_key, x.U_key, x.V_key, shared, dtype), x.key),
        in_front(prefix_rows(x.prefix_value, x.U_value, x.V_value, shared, dtype), x.value),
    )


def by_head(parameter: Tensor) -> Tensor:
    return parameter[:, None, None]


def eager_16bit(shape: Shape, x: Inputs) -> Prepared:
    """As models' own eager attention does it: products in query's dtype, gate and softmax in float32."""
    P, N, G = shape.P, shape.N, shape.Hq // shape.Hkv
    visible = torch.ones(N, P + N, dtype=torch.bool, device=x.query.device).tril(P) if shape.is_causal else None

    def forward() -> Tensor:
        key, value = (t.repeat_interleave(G, dim=1) if G > 1 else t for t in concatenated(x, n_shared(shape)))
        s = (x.query @ key.mT).float() * shape.D**-0.5
        s_pre, s_ctx = s.split([P, N], dim=-1)
        s_pre = s_pre + by_head(x.gate_alpha) * torch.tanh(by_head(x.gate_tau) * s_pre)
        s = torch.cat([s_pre, s_ctx], dim=-1)
        if visible is not None:
            s = s.masked_fill(~visible, -torch.inf)
        return s.softmax(dim=-1).to(value.dtype) @ value

    return Prepared(forward, x.trained())


# PyTorch's own attention, which knows no gate


def _sdpa(query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
    bias = causal_lower_right(shape.N, shape.P + shape.N) if shape.is_causal else None
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=shape.Hq != shape.Hkv)


def sdpa_ungated(shape: Shape, x: Inputs) -> Prepared:
    forward = lambda: _sdpa(x.query, *concatenated(x, n_shared(shape)), shape)  # noqa: E731
    return Prepared(forward, leaves(x, gated=False))


def sdpa_ungated_cudnn(shape: Shape, x: Inputs) -> Prepared:
    if shape.is_causal:
        raise NotImplementedError("cuDNN knows no bottom-right causality")

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa_ungated(shape, x).forward()

    return Prepared(forward, leaves(x, gated=False))


def sdpa_ungated_no_concat(shape: Shape, x: Inputs) -> Prepared:
    """The prefix, as it is stored, already stands in front of the context: nothing but attention is timed."""
    with torch.no_grad():
        key, value = (
            in_front(rows.to(context.dtype), context).requires_grad_(context.requires_grad)
            for rows, context in ((x.prefix_key, x.key), (x.prefix_value, x.value))
        )

    def as_trained(gradients: Gradients) -> Gradients:
        split = {name: gradients[name].split([shape.P, shape.N], dim=2) for name in ("key", "value")}
        prefix = {f"prefix_{name}": rows.float().sum(0) for name, (rows, _) in split.items()}
        return {"query": gradients["query"]} | {name: context for name, (_, context) in split.items()} | prefix

    both = {"query": x.query, "key": key, "value": value}
    return Prepared(lambda: _sdpa(x.query, key, value, shape), both, as_trained)


# FlexAttention


@functools.cache
def _block_mask(N: int, P: int, device: str) -> Any:
    """Causality among the context's positions; the prefix is seen by all."""

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv < P) | (q >= kv - P)

    return create_block_mask(visible, None, None, N, P + N, device=device)


def _mask_of(shape: Shape, P: int, device: torch.device) -> Any:
    return _block_mask(shape.N, P, str(device)) if shape.is_causal else None


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def _for_device(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Compiled on a GPU; on a CPU, where only its logic is tested, as it is."""
    return _compiled(function) if device.type == "cuda" else function


def _flex_gated(tanh: Callable[[Tensor], Tensor], trained: dict[str, Tensor], shared: int, block_mask: Any) -> Tensor:
    x = Inputs(**trained, d_output=trained["query"])
    key, value = concatenated(x, shared)
    P, alpha, tau = x.prefix_key.shape[1], x.gate_alpha, x.gate_tau

    def gate(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return torch.where(kv < P, score + alpha[h] * tanh(tau[h] * score), score)

    grouped = x.query.shape[1] != key.shape[1]
    return flex_attention(x.query, key, value, score_mod=gate, block_mask=block_mask, enable_gqa=grouped)


def _flex_exact(trained: dict[str, Tensor], shared: int, block_mask: Any) -> Tensor:
    return _flex_gated(torch.tanh, trained, shared, block_mask)


def _flex_approx(trained: dict[str, Tensor], shared: int, block_mask: Any) -> Tensor:
    return _flex_gated(tanh_approx, trained, shared, block_mask)


def _flex(function: Callable[..., Tensor]) -> Peer:
    def prepare(shape: Shape, x: Inputs) -> Prepared:
        if function is _flex_approx and x.query.is_cuda:
            lower_to_ptx()
        run = _for_device(function, x.query.device)
        block_mask = _mask_of(shape, shape.P, x.query.device)
        return Prepared(lambda: run(x.trained(), n_shared(shape), block_mask), x.trained())

    return Peer(prepare)


def merged(
    context: Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor]],
    trained: dict[str, Tensor],
    shared: int,
    block_mask: Any,
) -> Tensor:
    """Context by `context`, which also gives a log-sum-exp [B, Hq, N]; the prefix by products; both merged."""
    x = Inputs(**trained, d_output=trained["query"])
    dtype, Hkv = x.query.dtype, x.key.shape[1]
    o_ctx, L_ctx = context(x.query, x.key, x.value, block_mask)
    key = prefix_rows(x.prefix_key, x.U_key, x.V_key, shared, dtype)
    value = prefix_rows(x.prefix_value, x.U_value, x.V_value, shared, dtype)
    query = x.query.unflatten(1, (Hkv, -1))  # [B, Hkv, G, N, D]
    s = torch.einsum("bhgnd,hpd->bhgnp", query, key).flatten(1, 2).float() * x.query.shape[-1] ** -0.5
    s = s + by_head(x.gate_alpha) * torch.tanh(by_head(x.gate_tau) * s)
    L = torch.logaddexp(L_ctx, s.logsumexp(dim=-1))
    p = torch.exp(s - L[..., None]).to(dtype).unflatten(1, (Hkv, -1))
    o_pre = torch.einsum("bhgnp,hpd->bhgnd", p, value).flatten(1, 2)
    return (o_ctx * torch.exp(L_ctx - L)[..., None] + o_pre).to(dtype)


def _flex_context(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> tuple[Tensor, Tensor]:
    grouped = query.shape[1] != key.shape[1]
    output, aux = flex_attention(
        query, key, value, block_mask=block_mask, enable_gqa=grouped, return_aux=AuxRequest(lse=True)
    )
    assert aux.lse is not None
    return output, aux.lse


def _flex_merged(trained: dict[str, Tensor], shared: int, block_mask: Any) -> Tensor:
    return merged(_flex_context, trained, shared, block_mask)


def flex_merged(shape: Shape, x: Inputs) -> Prepared:
    run = _for_device(_flex_merged, x.query.device)
    block_mask = _mask_of(shape, 0, x.query.device)
    return Prepared(lambda: run(x.trained(), n_shared(shape), block_mask), x.trained())


PEERS = {
    "fused": _own("fused", gated=True, reweighted=True),
    "fused-ungated": _own("fused", gated=False, reweighted=False),
    "fused-prefix-only": Peer(fused_prefix_only),
    "composed": _own("composed", gated=True, reweighted=True),
    "composed-ungated": _own("composed", gated=False, reweighted=False),
    "eager": _own("reference", gated=True, reweighted=True),
    "eager-16bit": Peer(eager_16bit),
    "sdpa-ungated": Peer(sdpa_ungated, gated=False),
    "sdpa-ungated-cudnn": Peer(sdpa_ungated_cudnn, gated=False),
    "sdpa-ungated-no-concat": Peer(sdpa_ungated_no_concat, gated=False, reweighted=False),
    "flex": _flex(_flex_exact),
    "flex-merged": Peer(flex_merged),
    "flex-tanh-approx": _flex(_flex_approx),
}
