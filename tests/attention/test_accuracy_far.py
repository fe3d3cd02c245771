"""Scores, masks and biases far from 0, where rounding could take everything, on every backend."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast import prefix_attention

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
BASE = {"B": 1, "Hkv": 1, "G": 2, "N": 17, "M": 15, "P": 5, "D": 16, "Dv": 16}


@pytest.mark.ways()
def test_a_context_far_below_the_prefix_and_a_prefix_far_below_the_context(make_call, backend, dtype):
    arguments = make_call(**BASE | {"dtype": dtype, "B": 2, "P": 5, "M": 7})
    padding, bias = torch.zeros(2, 7), torch.zeros(1, 1, 17, 5)
    padding[0] = -1e9
    bias[:, :, :4] = -1e9
    arguments |= {"attn_mask": padding, "prefix_bias": bias}
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    (output, lse), (expected, expected_lse) = (
        prefix_attention(**x, return_lse=True, backend=b) for x, b in ((arguments, backend), (exact, "reference"))
    )
    grads, expected_grads = (
        torch.autograd.grad(o.sum(), [x[name] for name in ("query", "prefix_value")], retain_graph=True)
        for o, x in ((output[:, :, 4:], arguments), (expected[:, :, 4:], exact))
    )
    tolerance = {F32: 2e-5, F16: 4e-3, BF16: 3e-2}[dtype]
    for b, first in ((0, 4), (1, 0)):  # where both are so far out, float32 cannot tell the scores apart
        for x, want in ((output, expected), (grads[0], expected_grads[0])):
            torch.testing.assert_close(x[b, :, first:].double(), want[b, :, first:], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(grads[1].double(), expected_grads[1], rtol=tolerance, atol=5 * tolerance)


@pytest.mark.ways()
@pytest.mark.parametrize("bias_dtype", [F16, BF16, F32])
def test_the_most_negative_number_of_a_bias_hides_prefix_rows(make_call, backend, dtype, bias_dtype):
    """And so does -inf; a query from which all is hidden gets 0."""
    arguments = make_call(**BASE | {"dtype": dtype, "M": 0})
    bias = torch.zeros(1, 1, 17, 5, dtype=bias_dtype)
    bias[..., 1] = torch.finfo(bias_dtype).min
    bias[..., 2] = -torch.inf
    bias[:, :, 3] = torch.finfo(bias_dtype).min
    arguments["prefix_bias"] = bias
    output, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
    expected, expected_lse = prefix_attention(**arguments, return_lse=True, backend="reference")
    grad, expected_grad = (torch.autograd.grad(o.sum(), arguments["prefix_value"])[0] for o in (output, expected))
    assert (output[:, :, 3] == 0).all() and lse[:, :, 3].isneginf().all() and (grad[:, 1:3] == 0).all()
    tolerance = {F32: 1e-5, F16: 4e-3, BF16: 3e-2}[dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    by_tanh_approx = 2.0**-11 * arguments["gate_alpha"] if dtype == BF16 else 0.0
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4 + by_tanh_approx)
    torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.ways()
@pytest.mark.parametrize("size", [100.0, -100.0])
@pytest.mark.parametrize("far", [4e9, -4e9, 1e4, 0.0])
def test_scores_of_any_size_around_a_mask_of_any_size(make_call, backend, dtype, size, far):
    """The context's log-sum-exp is far + size: what is added to it after rounding may itself be large."""
    arguments = make_call(**BASE | {"dtype": dtype, "M": 4})
    arguments["query"], arguments["key"] = (torch.ones_like(arguments[name]) for name in ("query", "key"))
    arguments["key"] *= size / arguments["query"].shape[-1] ** 0.5
    arguments["attn_mask"] = torch.full((1, 4), far)
    output, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    expected, expected_lse = prefix_attention(**exact, return_lse=True, backend="reference")
    tolerance = (
        {F32: 1e-4, F16: 4e-3, BF16: 3e-2}[dtype] if far != 1e4 else 2e-2
    )  # 1e4 ± 1 has 10 bits behind the point
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=0.1)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("far", [-1e4, -1e9, -1e30, -3e38, 3e38])
@pytest.mark.ways()
def test_additive_masks_of_any_size(make_call, backend, dtype, far, is_causal):
    """Keys that are far below all others, in whole tiles, and queries that see nothing else."""
    arguments = make_call(**BASE | {"dtype": dtype, "P": 0, "M": 70, "G": 1}, is_causal=is_causal)
    mask = torch.zeros(1, 1, 17, 70)
    mask[..., : 50 if is_causal else 66] = far
    mask[:, :, 5] = far
    arguments["attn_mask"] = mask
    output, lse = prefix_attention(**arguments, return_lse=True, backend=backend)
    grads = torch.autograd.grad(output.sum(), [arguments[name] for name in ("query", "key", "value")])
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    expected, expected_lse = prefix_attention(**exact, return_lse=True, backend="reference")
    tolerance = {F32: 2e-5, F16: 4e-3, BF16: 3e-2}[dtype]
    seeing = [n for n in range(17) if n != 5]  # so far out float32 cannot tell apart the scores of query 5
    if backend == "composed" and far > 0:
        seeing = []  # nor any query's; the composed backend can, taking the mask's largest number off it
    torch.testing.assert_close(output[:, :, seeing].double(), expected[:, :, seeing], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)
    assert all(x.isfinite().all() for x in (output, lse, *grads))
    # What a query gives to the values adds up to what it was given: no weight is lost or made up.
    torch.testing.assert_close(grads[2].double().sum(), output.new_tensor(output.numel()).double(), rtol=5e-3, atol=0)
