"""What tests add to Triton's interpreter: bfloat16, against PyTorch's own, and tanh.approx, against its bound."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from qtuning_fast.kernels.target import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="on a GPU bfloat16 is right"),
    pytest.mark.usefixtures("bfloat16_in_interpreter"),
    pytest.mark.filterwarnings("ignore:.* encountered in cast:RuntimeWarning"),  # by numbers that the dtype cannot hold
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EXTREMES = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-40, -1e-45, 65504.0, 6e-8]


@triton.jit
def copy_kernel(x, y, BLOCK: tl.constexpr, ROUNDING: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def dot_kernel(x, y, z, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(z + at, tl.dot(a, tl.trans(b), tl.full([BLOCK, BLOCK], 0.5, tl.float32)))


@triton.jit
def promoting_kernel(x, y, results, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)  # bfloat16 and float32
    tl.store(results + i, a + b)
    tl.store(results + BLOCK + i, b * a)
    tl.store(results + 2 * BLOCK + i, tl.maximum(a, b))
    tl.store(results + 3 * BLOCK + i, tl.exp(a.to(tl.float32)) - b)
    tl.store(results + 4 * BLOCK + i, tl.where(a.to(tl.float32) > b, a, b))


@triton.jit
def tanh_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    t = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [tl.load(x + i)], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(y + i, t)


def cast(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    size = triton.next_power_of_2(len(x))
    padded, y = x.new_zeros(size), torch.empty(size, dtype=dtype)
    padded[: len(x)] = x
    copy_kernel[(1,)](padded, y, size, rounding)
    return y[: len(x)]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit by bit, signs of zeros too; a NaN is a NaN."""
    assert found.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    assert torch.equal(found[~nan].view(bits), expected[~nan].view(bits))


def every_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)


def around_every_bfloat16() -> torch.Tensor:
    """Float32 at, and next to, each bfloat16 and the middle between two: ties, carries, infinities, subnormals, NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int64)[:, None] << 16
    near = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (bits + near).flatten().to(torch.int32).view(F32)


def test_float32_is_rounded_to_the_nearest_and_ties_to_even():
    x = around_every_bfloat16()
    assert_same(cast(x, BF16), x.to(BF16))


def test_towards_zero_where_a_kernel_says_so():
    x = around_every_bfloat16()
    bits = x.view(torch.int32) >> 16
    assert_same(cast(x, BF16, "rtz"), bits.to(torch.int16).view(BF16).where(~x.isnan(), torch.nan))


@pytest.mark.parametrize("dtype", [torch.float64, F16, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_other_dtypes_become_bfloat16_as_in_pytorch(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1000
    x = torch.cat([x, torch.tensor(EXTREMES, dtype=x.dtype)]) if dtype.is_floating_point else x
    x = (x if dtype.itemsize < 4 else x * 1e4).to(dtype)
    assert_same(cast(x, BF16), x.to(BF16))


@pytest.mark.parametrize("dtype", [torch.float64, F32, F16])
def test_bfloat16_becomes_another_dtype_as_in_pytorch(dtype):
    x = every_bfloat16()
    assert_same(cast(x, dtype), x.to(dtype))


def test_bfloat16_becomes_integers_as_in_pytorch():
    x = (torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1000).to(BF16)
    assert_same(cast(x, torch.int32), x.to(torch.int32))


def test_products_of_bfloat16_are_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 32, 32, generator=generator).to(BF16)
    z = torch.empty(32, 32)
    dot_kernel[(1,)](x, y, z, 32)
    torch.testing.assert_close(z, x.float() @ y.float().T + 0.5, rtol=1e-5, atol=1e-5)


def test_arithmetic_that_promotes():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, generator=generator).to(BF16), torch.randn(64, generator=generator)
    for dtype in (F32, BF16):
        results = torch.empty(5, 64, dtype=dtype)
        promoting_kernel[(1,)](a, b, results, 64)
        expected = torch.stack([a + b, b * a, torch.maximum(a.float(), b), a.float().exp() - b, torch.maximum(a, b)])
        epsilon = torch.finfo(dtype).eps
        torch.testing.assert_close(results, expected.to(dtype), rtol=2 * epsilon, atol=4 * torch.finfo(F32).eps)


@pytest.mark.parametrize("tanh_approx_in_interpreter", ["too large", "too small", "varied"], indirect=True)
def test_tanh_approx_is_off_by_a_relative_2_to_the_minus_11_at_most(tanh_approx_in_interpreter, request):
    x = torch.cat([torch.linspace(-12, 12, 2000), torch.logspace(-37, 2, 48)])
    y, again = torch.empty(2, 2048)
    tanh_kernel[(1,)](x, y, 2048)
    tanh_kernel[(1,)](x.flip(0), again, 2048)
    assert torch.equal(y, again.flip(0))
    error = (y.double() / x.double().tanh() - 1) * 2.0**11
    kind = request.node.callspec.params["tanh_approx_in_interpreter"]
    least, most = {"too large": (1, 1), "too small": (-1, -1), "varied": (-1, 1)}[kind]
    assert error.min() == pytest.approx(least, abs=1e-3) and error.max() == pytest.approx(most, abs=1e-3)
