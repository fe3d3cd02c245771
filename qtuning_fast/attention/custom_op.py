"""A backend's forward and backward pass as two PyTorch custom operators and as an autograd function.

`torch.compile`, export, fake tensors and dispatch modes see the custom operators. If none of them is active, an
autograd function calls the passes, because dispatching an operator with so many arguments doubles the host's time;
where nothing needs a gradient, they are called as they are. All ways take the fields of a `PrefixAttentionCall` one by
one and compute the same, and the first two save the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qtuning_fast.attention.arguments import INPUTS, SCHEMA, PrefixAttentionCall, flattened
from qtuning_fast.attention.common import no_autocast

Outputs = tuple[Tensor, Tensor, Tensor]  # output, log-sum-exp, and the latter's rounding residual or an empty tensor


class Passes(Protocol):
    """The passes of a backend. `needed` names those of INPUTS that need a gradient, in the order of the gradients."""

    def forward(self, call: PrefixAttentionCall, /) -> Outputs:
        """Compute output, log-sum-exp and its residual."""

    def empty_outputs(self, call: PrefixAttentionCall, /) -> Outputs:
        """Allocate outputs with the shapes, strides and dtypes of `forward`'s."""

    def backward(
        self,
        call: PrefixAttentionCall,
        output: Tensor,
        lse: Tensor,
        lse_rest: Tensor,
        d_output: Tensor,
        needed: Sequence[str],
        /,
    ) -> list[Tensor]:
        """Compute the gradients that are needed."""

    def empty_gradients(self, call: PrefixAttentionCall, needed: Sequence[str], /) -> list[Tensor]:
        """Allocate gradients with the shapes, strides and dtypes of `backward`'s."""


def operator(name: str, passes: Callable[[], Passes]) -> Callable[[PrefixAttentionCall], tuple[Tensor, Tensor]]:
    """Register `torch.ops.qtuning_fast.{name}` and `{name}_backward`.

    Args:
        passes: returns the passes; it is called when they are first needed.

    Returns:
        A function from a call to output and log-sum-exp; the output is differentiable once, in reverse mode. It gives
        the passes a positive scale and, without a gate, no tensors for alpha and tau.
    """

    def forward(*arguments: Any) -> Outputs:
        call = PrefixAttentionCall(*arguments)
        with _device_of(call.query):
            return passes().forward(call)

    def forward_fake(*arguments: Any) -> Outputs:
        return passes().empty_outputs(PrefixAttentionCall(*arguments))

    def backward(
        output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor, needs: Sequence[bool], *arguments: Any
    ) -> list[Tensor]:
        call = PrefixAttentionCall(*arguments)
        with _device_of(call.query), no_autocast(call.query):
            return passes().backward(call, output, lse, lse_rest, d_output, _needed_names(needs))

    def backward_fake(
        output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor, needs: Sequence[bool], *arguments: Any
    ) -> list[Tensor]:
        return passes().empty_gradients(PrefixAttentionCall(*arguments), _needed_names(needs))

    def autograd(ctx: Any, d_output: Tensor | None, *d_others: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of all arguments, None where none is needed; only the first output has a gradient."""
        needs = list(ctx.needs_input_grad[: len(INPUTS)])
        nothing = (None,) * len(ctx.is_tensor)
        if d_output is None or not any(needs):
            return nothing
        saved = ctx.saved_tensors  # read once: checkpointing unpacks at each access
        *tensors, output, lse, lse_rest = saved
        tensors, others = iter(tensors), iter(ctx.others)
        inputs = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
        # When the backward pass itself is recorded, only the operator reports that it has no second derivative.
        unseen = not torch.is_grad_enabled() and _may_bypass_dispatcher((d_output, *saved))
        run = backward if unseen else backward_operator
        gradients = iter(run(output, lse, lse_rest, d_output, needs, *inputs))
        return (*(next(gradients) if needed else None for needed in needs), *nothing[len(INPUTS) :])

    class PrefixAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Outputs:
            output, lse, lse_rest = forward(*arguments)
            outputs = output.detach(), lse, lse_rest  # not a view of the allocation: callers may write to it
            _setup_context(ctx, arguments, outputs)
            return outputs

        backward = staticmethod(autograd)

    define = torch.library.custom_op
    forward_operator = define(
        f"qtuning_fast::{name}", forward, mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor)"
    )
    forward_operator.register_fake(forward_fake)
    backward_operator = define(
        f"qtuning_fast::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor output, Tensor lse, Tensor lse_rest, Tensor d_output, bool[] needs, {SCHEMA}) -> Tensor[]",
    )
    backward_operator.register_fake(backward_fake)
    forward_operator.register_autograd(autograd, setup_context=_setup_context)

    def attend(call: PrefixAttentionCall) -> tuple[Tensor, Tensor]:
        """Compute output `[B, Hq, N, Dv]` and log-sum-exp `[B, Hq, N]`, which has no gradient.

        Raises:
            NotImplementedError: forward-mode differentiation passes through the call.
        """
        if call.scale <= 0:  # a running maximum of scaled products needs a positive scale
            sign = -1.0 if call.scale < 0 else 0.0
            call = replace(call, query=call.query * sign, scale=abs(call.scale) or 1.0)
        if call.gate is None:
            call = replace(call, gate_alpha=None, gate_tau=None)  # unused, and without a gradient
        arguments = flattened(call)
        if _has_tangents(arguments):  # an operator would drop them silently
            raise NotImplementedError(f"{name} has no forward-mode derivative; backend='reference' has it")
        if not _may_bypass_dispatcher(arguments):
            output, lse, _ = forward_operator(*arguments)
            return output, lse.detach()
        if any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            if torch.is_grad_enabled():
                output, lse, _ = PrefixAttention.apply(*arguments)
                return output, lse.detach()
            arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)  # passes look at it, too
        output, lse, _ = forward(*arguments)
        return output.detach(), lse  # not a view of the allocation: callers may write to it

    return attend


def _needed_names(needs: Sequence[bool]) -> list[str]:
    return [name for name, needed in zip(INPUTS, needs) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
    ctx.others = [x for x in inputs if not isinstance(x, Tensor)]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output)


def _has_tangents(arguments: Iterable[Any]) -> bool:
    """Return whether forward-mode automatic differentiation passes through an argument."""
    # PyTorch has only private functions, here and below, that tell cheaply whether a mode is active.
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in arguments if isinstance(x, Tensor))


def _may_bypass_dispatcher(arguments: Iterable[Any]) -> bool:
    """Return whether no compiler, tracer, transform, mode or tensor subclass needs to see the operators."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack():  # modes of this thread
        return False
    return all(type(x) in _PLAIN and _memory_holds_values(x) for x in arguments if isinstance(x, Tensor))


def _memory_holds_values(x: Tensor) -> bool:
    """Return whether a tensor's memory holds its values; if not, the dispatcher materialises them for an operator."""
    return not (x.is_meta or x.is_neg() or x._is_zerotensor())


_PLAIN = (Tensor, torch.nn.Parameter)
_NO_SWITCH = nullcontext()


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device_of(x) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _NO_SWITCH
