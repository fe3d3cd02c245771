"""Backend "fused": one Triton kernel forward, at most three backward, as PyTorch custom operators.

`torch.ops.qtuning_fast.attention` and `attention_backward` take the fields of a call one by one, as operators must;
`_pack` and `_unpack` translate.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qtuning_fast.call import PrefixAttentionCall

LARGEST_HEAD_SIZE = 256


def why_not(call: PrefixAttentionCall) -> str | None:
    """What the kernels cannot do about a call."""
    query = call.query
    if query.device.type == "cpu" and not _interpreted():
        return "its Triton kernels need a GPU, and query is on the CPU"
    if query.device.type not in ("cpu", "cuda"):
        return f"its Triton kernels run on CUDA and ROCm devices, and query is on {query.device}"
    if query.dtype == torch.float64:
        return "its Triton kernels compute in float32, and query is float64"
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return "Triton's interpreter cannot multiply bfloat16"
    largest = max(query.shape[-1], call.value.shape[-1])
    if largest > LARGEST_HEAD_SIZE:
        return f"its Triton kernels take head sizes up to {LARGEST_HEAD_SIZE}, got {largest}"
    return None


def only_by_name(call: PrefixAttentionCall) -> str | None:
    """Why "auto" passes by what the kernels could do."""
    return "Triton's interpreter, for tests, runs only when asked for by name" if call.query.is_cpu else None


def _interpreted() -> bool:
    if "TRITON_INTERPRET" not in os.environ:  # most calls on a CPU: importing triton takes a second
        return False
    from qtuning_fast.kernels.target import INTERPRETED

    return INTERPRETED


def attend(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; the former differentiable once, in reverse mode."""
    if call.scale <= 0:  # the kernels' running maximum wants a positive scale
        sign = -1.0 if call.scale < 0 else 0.0
        call = replace(call, query=call.query * sign, scale=abs(call.scale) or 1.0)
    if call.gate is None:
        call = replace(call, gate_alpha=1.0, gate_tau=1.0)  # they play no part, and get no gradient
    output, lse, _ = _attention(*_unpack(call))
    return output, lse.detach()


def _unpack(call: PrefixAttentionCall) -> tuple[Any, ...]:
    """A call as the arguments of the operators."""
    U_key, V_key = call.reweight_key or (None, None)
    U_value, V_value = call.reweight_value or (None, None)
    alpha, tau = call.gate_alpha, call.gate_tau
    return (
        call.query,
        call.key,
        call.value,
        call.prefix_key,
        call.prefix_value,
        U_key,
        V_key,
        U_value,
        V_value,
        alpha if isinstance(alpha, Tensor) else None,
        tau if isinstance(tau, Tensor) else None,
        1.0 if isinstance(alpha, Tensor) else alpha,
        1.0 if isinstance(tau, Tensor) else tau,
        call.prefix_index,
        call.prefix_length,
        call.padding_mask,
        call.attn_mask,
        call.prefix_bias,
        call.n_shared,
        call.gate,
        call.is_causal,
        call.scale,
    )


def _pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    U_key: Tensor | None,
    V_key: Tensor | None,
    U_value: Tensor | None,
    V_value: Tensor | None,
    gate_alpha: Tensor | None,
    gate_tau: Tensor | None,
    alpha_number: float,
    tau_number: float,
    prefix_index: Tensor | None,
    prefix_length: Tensor | None,
    padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    prefix_bias: Tensor | None,
    n_shared: int,
    gate: str | None,
    is_causal: bool,
    scale: float,
) -> PrefixAttentionCall:
    """A call from the arguments of the operators."""
    return PrefixAttentionCall(
        query=query,
        key=key,
        value=value,
        prefix_key=prefix_key,
        prefix_value=prefix_value,
        prefix_index=prefix_index,
        prefix_length=prefix_length,
        n_shared=n_shared,
        reweight_key=None if U_key is None or V_key is None else (U_key, V_key),
        reweight_value=None if U_value is None or V_value is None else (U_value, V_value),
        gate=gate,
        gate_alpha=alpha_number if gate_alpha is None else gate_alpha,
        gate_tau=tau_number if gate_tau is None else gate_tau,
        padding_mask=padding_mask,
        attn_mask=attn_mask,
        prefix_bias=prefix_bias,
        is_causal=is_causal,
        scale=scale,
    )


_CALL = (
    "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, "
    "Tensor? U_key, Tensor? V_key, Tensor? U_value, Tensor? V_value, Tensor? gate_alpha, Tensor? gate_tau, "
    "float alpha_number, float tau_number, Tensor? prefix_index, Tensor? prefix_length, "
    "Tensor? padding_mask, Tensor? attn_mask, Tensor? prefix_bias, "
    "int n_shared, str? gate, bool is_causal, float scale"
)
_DIFFERENTIABLE = 11  # the first so many arguments, in the order of kernels.backward.INPUTS


@torch.library.custom_op("qtuning_fast::attention", mutates_args=(), schema=f"({_CALL}) -> (Tensor, Tensor, Tensor)")
def _attention(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from qtuning_fast.kernels.forward import forward

    call = _pack(*arguments)
    with _device_of(call.query):
        return forward(call)


@_attention.register_fake
def _attention_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from qtuning_fast.kernels.forward import empty_outputs

    call = _pack(*arguments)
    return empty_outputs(call)


@torch.library.custom_op(
    "qtuning_fast::attention_backward",
    mutates_args=(),
    schema=f"(Tensor output, Tensor lse, Tensor lse_rest, Tensor d_output, bool[] needs, {_CALL}) -> Tensor[]",
)
def _attention_backward(
    output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor, needs: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    """The gradients that `needs` says, in the order of kernels.backward.INPUTS."""
    from qtuning_fast.kernels.backward import backward

    call = _pack(*arguments)
    with _device_of(call.query):
        return backward(call, output, lse, lse_rest, d_output, needs)


@_attention_backward.register_fake
def _attention_backward_fake(
    output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor, needs: Sequence[bool], *arguments: Any
) -> list[Tensor]:
    from qtuning_fast.kernels.backward import empty_gradients

    return list(empty_gradients(_pack(*arguments), needs).values())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
    ctx.others = [x for x in inputs if not isinstance(x, Tensor)]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output)


def _backward(ctx: Any, d_output: Tensor | None, *d_others: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    nothing = (None,) * len(ctx.is_tensor)
    if d_output is None or not any(needs):
        return nothing
    *tensors, output, lse, lse_rest = ctx.saved_tensors
    tensors, others = iter(tensors), iter(ctx.others)
    inputs = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
    gradients = iter(_attention_backward(output, lse, lse_rest, d_output, needs, *inputs))
    return (*(next(gradients) if needed else None for needed in needs), *nothing[_DIFFERENTIABLE:])


_attention.register_autograd(_backward, setup_context=_setup_context)


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
