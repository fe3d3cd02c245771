"""A backend's forward and backward pass as a pair of PyTorch custom operators, and as an autograd function.

Custom operators are what `torch.compile`, export, fake tensors and dispatch modes see. Where none of them is active,
the passes are called through an autograd function, which saves the same tensors and does the same with them: the
plumbing of an operator with so many arguments takes the host as long as all else. Both take the fields of a
`PrefixAttentionCall` one by one.
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

Outputs = tuple[Tensor, Tensor, Tensor]  # output, log-sum-exp, and what rounding the latter left or an empty tensor


class Passes(Protocol):
    """What a backend computes. `needed` names those of INPUTS that need a gradient; gradients come in that order."""

    def forward(self, call: PrefixAttentionCall, /) -> Outputs: ...

    def empty_outputs(self, call: PrefixAttentionCall, /) -> Outputs:
        """Their shapes, strides and dtypes."""

    def backward(
        self,
        call: PrefixAttentionCall,
        output: Tensor,
        lse: Tensor,
        lse_rest: Tensor,
        d_output: Tensor,
        needed: Sequence[str],
        /,
    ) -> list[Tensor]: ...

    def empty_gradients(self, call: PrefixAttentionCall, needed: Sequence[str], /) -> list[Tensor]: ...


def operator(name: str, passes: Callable[[], Passes]) -> Callable[[PrefixAttentionCall], tuple[Tensor, Tensor]]:
    """Registers `torch.ops.qtuning_fast.{name}` and `{name}_backward`.

    Args:
        passes: gives them, when they are first needed.

    Returns what calls them: output and log-sum-exp, the former differentiable once, in reverse mode. The passes are
    handed calls with a positive scale, and without tensors for alpha and tau where there is no gate.
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
            return passes().backward(call, output, lse, lse_rest, d_output, _named(needs))

    def backward_fake(
        output: Tensor, lse: Tensor, lse_rest: Tensor, d_output: Tensor, needs: Sequence[bool], *arguments: Any
    ) -> list[Tensor]:
        return passes().empty_gradients(PrefixAttentionCall(*arguments), _named(needs))

    def autograd(ctx: Any, d_output: Tensor | None, *d_others: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of all arguments, None for those that need none; only the first output passes one on."""
        needs = list(ctx.needs_input_grad[: len(INPUTS)])
        nothing = (None,) * len(ctx.is_tensor)
        if d_output is None or not any(needs):
            return nothing
        saved = ctx.saved_tensors  # once: checkpointing unpacks them when asked
        *tensors, output, lse, lse_rest = saved
        tensors, others = iter(tensors), iter(ctx.others)
        inputs = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
        # With a graph of the backward pass itself, only the operator says that there is no second derivative.
        unseen = not torch.is_grad_enabled() and _is_unseen((d_output, *saved))
        run = backward if unseen else backward_operator
        gradients = iter(run(output, lse, lse_rest, d_output, needs, *inputs))
        return (*(next(gradients) if needed else None for needed in needs), *nothing[len(INPUTS) :])

    class PrefixAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Outputs:
            output, lse, lse_rest = forward(*arguments)
            outputs = output.detach(), lse, lse_rest  # no view of what was allocated: callers may write to it
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
        assert call.softcap is None, "no pass knows it: a backend refuses such a call"
        if call.scale <= 0:  # a running maximum of scaled products wants a positive scale
            sign = -1.0 if call.scale < 0 else 0.0
            call = replace(call, query=call.query * sign, scale=abs(call.scale) or 1.0)
        if call.gate is None:
            call = replace(call, gate_alpha=None, gate_tau=None)  # they play no part, and get no gradient
        arguments = flattened(call)
        if _has_tangents(arguments):  # an operator would drop them, and say nothing
            raise NotImplementedError(f"{name} has no forward-mode derivative; backend='reference' has it")
        run = PrefixAttention.apply if _is_unseen(arguments) else forward_operator
        output, lse, _ = run(*arguments)
        return output, lse.detach()

    return attend


def _named(needs: Sequence[bool]) -> list[str]:
    return [name for name, needed in zip(INPUTS, needs) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
    ctx.others = [x for x in inputs if not isinstance(x, Tensor)]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output)


def _has_tangents(arguments: Iterable[Any]) -> bool:
    """Whether forward-mode automatic differentiation goes through some argument."""
    # Private, as all that PyTorch has to ask cheaply whether a mode is on; so are those below.
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in arguments if isinstance(x, Tensor))


def _is_unseen(arguments: Iterable[Any]) -> bool:
    """Whether no compiler, tracer, transform, mode or kind of tensor is there that would want to see the operators."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack():  # of this thread
        return False
    return all(type(x) in _PLAIN and _is_what_it_points_to(x) for x in arguments if isinstance(x, Tensor))


def _is_what_it_points_to(x: Tensor) -> bool:
    """Whether kernels that read its memory read its numbers: else the dispatcher makes it so before an operator."""
    return not (x.is_meta or x.is_neg() or x._is_zerotensor())


_PLAIN = (Tensor, torch.nn.Parameter)
_AS_IT_IS = nullcontext()


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(x) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _AS_IT_IS
