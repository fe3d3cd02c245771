"""tanh as NVIDIA GPUs have it, one instruction, for functions that torch.compile turns into a kernel.

Our kernels take that instruction (`kernels/gate.py`); with it FlexAttention can, too. Uncompiled this is plain tanh.
"""

import functools
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("qtuning_fast_bench::tanh_approx", mutates_args=())
def _tanh_approx(x: Tensor) -> Tensor:
    return torch.tanh(x)


@_tanh_approx.register_fake
def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, d_output: Tensor) -> Tensor:
    (sigma,) = ctx.saved_tensors
    return d_output * (1 - sigma * sigma)


_tanh_approx.register_autograd(_backward, setup_context=_setup_context)


@_tanh_approx.register_vmap
def _vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
    return tanh_approx(x), in_dims[0]


def tanh_approx(x: Tensor) -> Tensor:
    """tanh(x), for float32 with a relative error below 2⁻¹¹ where it is compiled for a GPU after `lower_to_ptx`."""
    return torch.ops.qtuning_fast_bench.tanh_approx(x)


@functools.cache
def lower_to_ptx() -> None:
    """Tells PyTorch's compiler to put the instruction in place of the operator. A private interface of it."""
    from torch._inductor.lowering import make_pointwise, register_lowering
    from torch._inductor.virtualized import ops

    tanh = functools.partial(ops.inline_asm_elementwise, asm="tanh.approx.f32 $0, $1;", constraints="=f,f")

    @register_lowering(torch.ops.qtuning_fast_bench.tanh_approx, type_promotion_kind=None)
    def lower(x: Any) -> Any:
        return make_pointwise(tanh)(x)
