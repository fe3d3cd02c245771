"""δ and the gradient of the queries."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.kernels import arguments, backward_queries
from qtuning_fast.kernels.arguments import PerQuery
from qtuning_fast.kernels.forward import forward
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BASE = {"dtype": torch.float32, "B": 2, "Hkv": 1, "G": 2, "N": 5, "M": 7, "P": 3, "D": 16, "Dv": 24}


@pytest.fixture
def computed(checked, gradient_at):
    """The call, δ and dq, filled with NaN before; dq is None where no query needs one."""

    def compute(needed=True, **options):
        call = checked(**BASE | options)
        output, lse, rest = forward(call)
        delta = torch.full_like(lse, torch.nan)
        d_query = torch.full_like(call.query, torch.nan).detach() if needed else None
        shared, per_query = arguments.attention(call), PerQuery(lse, rest, delta)
        backward_queries.launch(call, shared, output, gradient_at(call), per_query, d_query).run()
        return call, delta, d_query

    return compute


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": None, "is_causal": True, "M": 9},
        {"T": 2, "lengths": True, "gate_shape": "task, head"},
        {"N": 18, "M": 17, "P": 17, "mask": "padding bool"},
        {"P": 0, "M": 3, "is_causal": True},  # some see nothing
    ],
    ids=str,
)
def test_both_are_the_definitions(computed, gradient_at, by_definition, options):
    call, delta, d_query = computed(**options)
    exact_output, _, exact = by_definition(call, gradient_at(call))
    torch.testing.assert_close(d_query.double(), exact["query"], rtol=1e-5, atol=1e-5)
    expected = (gradient_at(call).double() * exact_output).sum(-1)
    torch.testing.assert_close(delta.double(), expected, rtol=1e-5, atol=1e-5)


def test_delta_is_written_where_no_query_needs_a_gradient(computed):
    _, expected, _ = computed()
    _, delta, d_query = computed(needed=False)
    assert d_query is None and torch.equal(delta, expected)
