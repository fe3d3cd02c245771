"""What becomes of a product q k: scaled and, with a cap κ, kept within ±κ (Gemma 2: arXiv 2408.00118).

    s = c q k        cap(s) = κ tanh(s / κ)        d cap / ds = 1 - tanh²(s / κ)

The cap comes before gate, masks and bias, so masked scores stay masked.
"""

import triton
import triton.language as tl

from .gate import tanh

SMALL = tl.constexpr(0.25)  # up to here the series below is exact to float32's rounding


@triton.jit
def scaled(products, scaling):
    """The score and its derivative by c q k; without a cap the latter is a 1 that costs nothing."""
    s = products * scaling.factor
    if scaling.cap is None:
        return s, 1.0
    else:
        t = tanh_also_near_zero(s / scaling.cap)
        return t * scaling.cap, 1.0 - t * t


@triton.jit
def tanh_also_near_zero(x):
    """tanh(x), of small x with small relative error.

    `tanh` errs by float32's resolution at 1, which a cap of 50 would make fifty times as large.
    """
    t, _ = tanh(x, False)
    y = x * x
    series = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < SMALL, series, t)
