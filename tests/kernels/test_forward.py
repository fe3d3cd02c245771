"""The forward kernel: output, log-sum-exp and what its rounding leaves, in room of its own."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.kernels.forward import empty_outputs, forward, launches
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BASE = {"dtype": torch.float32, "B": 2, "Hkv": 1, "G": 2, "N": 5, "M": 7, "P": 3, "D": 16, "Dv": 24}
CALLS = [
    {"rank_key": 1, "rank_value": 2, "n_shared": 1},
    {"gate": None, "is_causal": True, "M": 9},
    {"T": 3, "lengths": True, "gate_shape": "task, head"},
    {"mask": "full float", "bias": True},
    {"N": 18, "M": 33, "P": 17, "is_causal": True, "mask": "padding bool"},
    {"M": 0},
]


@pytest.mark.parametrize("options", CALLS, ids=str)
def test_it_is_the_definition(checked, by_definition, gradient_at, options):
    call = checked(**BASE | options)
    exact, exact_lse, _ = by_definition(call, gradient_at(call))
    output, lse, rest = forward(call)
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double() + rest, exact_lse, rtol=1e-6, atol=1e-6)


def test_the_output_lies_as_models_go_on_with_it(checked):
    call = checked(**BASE)
    output, lse, rest = empty_outputs(call)
    assert output.transpose(1, 2).is_contiguous() and output.shape == (2, 2, 5, 24)
    assert lse.shape == rest.shape == (2, 2, 5) and lse.dtype == torch.float32


def test_a_rest_is_kept_where_scores_may_be_large(checked):
    for options, kept in ({}, False), ({"mask": "padding bool"}, False), ({"mask": "padding float"}, True):
        *_, rest = empty_outputs(checked(**BASE | {"dtype": torch.float16} | options))
        assert bool(rest.numel()) == kept


def test_a_query_that_sees_nothing_gets_zero(checked):
    output, lse, rest = forward(checked(**BASE | {"P": 0, "M": 3, "is_causal": True}))
    assert (output[:, :, :2] == 0).all() and lse[:, :, :2].isneginf().all() and (rest[:, :, :2] == 0).all()
    assert lse[:, :, 2:].isfinite().all()


def test_the_prefix_is_folded_first_only_where_it_must_be(checked):
    for options, expected in ({"rank_key": 1}, ["fold_kernel", "forward_kernel"]), ({}, ["forward_kernel"]):
        call = checked(**BASE | options)
        assert [launch.kernel.fn.__name__ for launch in launches(call, *empty_outputs(call))] == expected
