"""δ, and what the prefix adds to the gradient of the queries."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.kernels import arguments, prefix_queries
from qtuning_fast.kernels.arguments import PerQuery
from qtuning_fast.kernels.forward import forward
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BASE = {"dtype": torch.float32, "B": 3, "Hkv": 1, "G": 2, "N": 5, "M": 0, "P": 3, "D": 16, "Dv": 24}


@pytest.mark.parametrize(
    "options",
    [{}, {"gate": None}, {"bias": True}, {"T": 4, "lengths": True, "gate_shape": "task, head"}, {"N": 1, "P": 17}],
    ids=str,
)
def test_without_a_context_it_adds_the_whole_gradient(checked, gradient_at, by_definition, options):
    call = checked(**BASE | options)
    output, lse, rest = forward(call)
    d_output = gradient_at(call)
    _, _, exact = by_definition(call, d_output)
    delta, d_query = torch.full_like(lse, torch.nan), torch.ones_like(call.query).detach()
    shared = arguments.attention_to_prefix(call)
    prefix_queries.launch(call, shared, output, d_output, PerQuery(lse, rest, delta), d_query).run()
    torch.testing.assert_close(d_query.double() - 1, exact["query"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta, (d_output * output).sum(-1), rtol=1e-5, atol=1e-5)


def test_samples_are_sorted_only_where_their_prefixes_are_read(checked, gradient_at):
    call = checked(**BASE | {"T": 4})
    output, lse, rest = forward(call)
    for d_query in (None, torch.zeros_like(call.query)):
        per_query = PerQuery(lse, rest, torch.empty_like(lse))
        shared = arguments.attention_to_prefix(call)
        launch = prefix_queries.launch(call, shared, output, gradient_at(call), per_query, d_query)
        assert (launch.arguments["order"] is None) == (d_query is None)
