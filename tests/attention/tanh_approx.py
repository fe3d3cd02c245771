"""NVIDIA's tanh.approx.f32 in Triton's interpreter, which runs no inline assembly: tanh with a relative error.

The manual (PTX ISA, "tanh") bounds it by 2⁻¹¹ over the whole range, and says no more. So it is always that large, of
either sign, or varies with the bits of x: equal x give equal results, as on the device. Results may lie beyond 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

LARGEST = 2.0**-11
ERRORS = {
    "too large": lambda x: LARGEST,
    "too small": lambda x: -LARGEST,
    "varied": lambda x: LARGEST * np.cos(x.view(np.uint32).astype(np.float64)),
}


class _Call(NamedTuple):
    result: TensorHandle

    def get_result(self, i: int) -> TensorHandle:
        return self.result


def create_inline_asm(error: str) -> Callable[..., Any]:
    """The method of InterpreterBuilder, with one of ERRORS."""

    def create(self, asm, constraints, values, *options):
        assert asm.startswith("tanh.approx.f32 "), asm
        x = values[0].data
        return _Call(
            TensorHandle((np.tanh(x.astype(np.float64)) * (1 + ERRORS[error](x))).astype(np.float32), tl.float32)
        )

    return create
