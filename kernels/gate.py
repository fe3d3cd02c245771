"""The gate on prefix scores, g(s) = s + α·σ(τ·s), and its derivatives (NoRGa: Le et al., arXiv 2405.14124).

    dg/ds = 1 + α τ σ'(τ s)        dg/dα = σ(τ s)        dg/dτ = α s σ'(τ s)

GATE names σ and is known at compile time; "none" means no gate, g(s) = s. FAST_TANH selects the hardware's tanh of
NVIDIA GPUs, one instruction with a relative error of about 2⁻¹¹, for bfloat16, which keeps 8 bits.
"""

import triton
import triton.language as tl


@triton.jit
def gated(s, alpha, tau, GATE: tl.constexpr, FAST_TANH: tl.constexpr):
    """g(s)."""
    if GATE == "none":
        return s
    else:
        sigma, _ = activation(tau * s, GATE, FAST_TANH)
        return s + alpha * sigma


@triton.jit
def gated_with_derivatives(s, alpha, tau, GATE: tl.constexpr, FAST_TANH: tl.constexpr):
    """g(s), dg/ds, dg/dα and dg/dτ."""
    if GATE == "none":
        nothing = tl.zeros_like(s)
        return s, nothing + 1.0, nothing, nothing
    else:
        sigma, slope = activation(tau * s, GATE, FAST_TANH)
        return s + alpha * sigma, 1.0 + alpha * tau * slope, sigma, alpha * s * slope


@triton.jit
def activation(x, GATE: tl.constexpr, FAST_TANH: tl.constexpr):
    """σ(x) and σ'(x); an unused one costs nothing."""
    tl.static_assert(
        GATE == "tanh"
        or GATE == "sigmoid"
        or GATE == "gelu"
        or GATE == "relu"
        or GATE == "softplus"
        or GATE == "elu"
        or GATE == "identity"
    )
    if GATE == "tanh":
        sigma, slope = tanh(x, FAST_TANH)
    elif GATE == "sigmoid":
        sigma, slope = sigmoid(x, FAST_TANH)
    elif GATE == "gelu":
        Phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        sigma = x * Phi
        slope = Phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif GATE == "relu":
        sigma = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif GATE == "softplus":
        sigma = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
        slope, _ = sigmoid(x, FAST_TANH)
    elif GATE == "elu":
        exp = tl.exp(tl.minimum(x, 0.0))
        sigma = tl.where(x > 0, x, exp - 1.0)
        slope = tl.where(x > 0, 1.0, exp)
    else:
        sigma = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    return sigma, slope


@triton.jit
def tanh(x, FAST_TANH: tl.constexpr):
    """tanh(x) and its derivative, which 1 - tanh² would lose where tanh is near 1."""
    if FAST_TANH:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        return t, 1.0 - t * t
    else:
        e = tl.exp(-2.0 * tl.abs(x))
        r = 1.0 / (1.0 + e)
        t = (1.0 - e) * r
        return tl.where(x < 0, -t, t), 4.0 * e * r * r


@triton.jit
def sigmoid(x, FAST_TANH: tl.constexpr):
    """1 / (1 + exp(-x)) and its derivative."""
    if FAST_TANH:
        t, slope = tanh(0.5 * x, FAST_TANH)  # one instruction instead of an exponential and a quotient
        return 0.5 + 0.5 * t, 0.25 * slope
    else:
        e = tl.exp(-tl.abs(x))
        r = 1.0 / (1.0 + e)
        return tl.where(x < 0, e * r, r), e * r * r
