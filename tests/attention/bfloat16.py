"""bfloat16 done right in Triton's interpreter, where it is uint16: products of bits, casts that truncate, lost carries.

METHODS replace three of InterpreterBuilder's. Between two bfloat16, unpromoted, arithmetic remains one of bits."""

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast, _dot, _convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_to_fp


def _float32(x):
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _bfloat16(x, *, nearest=True):  # ties to even; or towards 0. By way of float32, as PyTorch goes.
    numbers = x.data.astype(np.float32)
    bits = numbers.view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1)) * nearest
    return TensorHandle(np.where(np.isnan(numbers), 0x7FC0, rounded >> 16).astype(np.uint16), tl.bfloat16)


def _cast_impl(self, x, to):
    if (x.dtype.scalar == tl.bfloat16) == (to.scalar == tl.bfloat16):
        return _cast(self, x, to)
    return _bfloat16(x) if to.scalar == tl.bfloat16 else _cast(self, _float32(x), to)


def _create_dot(self, a, b, *options):
    return _dot(self, *(_float32(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *options)


def _create_fp_to_fp(self, x, to, rounding):
    to_bfloat16 = to.scalar == tl.bfloat16 and not x.dtype.scalar.is_fp8()
    return _bfloat16(x, nearest=rounding != ir.ROUNDING_MODE.RTZ) if to_bfloat16 else _convert(self, x, to, rounding)


METHODS = {"cast_impl": _cast_impl, "create_dot": _create_dot, "create_fp_to_fp": _create_fp_to_fp}
