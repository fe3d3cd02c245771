"""The context part: how it is cut into pieces, and the masks that a vendor gets."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast import prefix_attention
from qtuning_fast.attention import composed
from qtuning_fast.attention.composed import context
from qtuning_fast.attention.composed.vendors import vendor_for

SIZES = {"dtype": torch.float32, "B": 2, "Hkv": 2, "G": 2, "N": 70, "M": 70, "P": 40, "D": 16, "Dv": 16}


def results(arguments, leaves, backend):
    """Output, log-sum-exp and every gradient, by name, in float64."""
    named = leaves(arguments)
    output, lse = prefix_attention(**arguments, backend=backend, return_lse=True)
    d_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(
        output, list(named.values()), d_output.to(output), allow_unused=True, materialize_grads=True
    )
    return {name: x.double() for name, x in {"output": output, "lse": lse, **dict(zip(named, found))}.items()}


PREFIXES = {
    "no prefix": {"P": 0},
    "empty prefixes of a bank": {"T": 2},
    "a hidden prefix": {},
    "a prefix": {},
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("rows", ["head", "padding"])
@pytest.mark.parametrize("sizes", [(6, 6), (4, 9), (9, 5), (1, 6)], ids=str)
@pytest.mark.parametrize("step", [1e5, -1e5])
def test_each_query_is_exact_under_a_row_of_numbers_that_causality_cuts(make_call, leaves, step, sizes, rows, prefix):
    """The largest number that a query sees is not the row's: two keys share each, so that a weight is not 0 or 1."""
    N, M = sizes
    arguments = make_call(**SIZES | {"N": N, "M": M, "P": 3, "is_causal": True} | PREFIXES[prefix])
    numbers = step * (torch.arange(M) // 2).float()
    arguments["attn_mask"] = numbers.expand((2, M) if rows == "padding" else (1, 4, 1, M)).clone()
    if prefix == "empty prefixes of a bank":
        arguments["prefix_length"] = torch.tensor([0, 3])
    if prefix == "a hidden prefix":
        arguments["prefix_bias"] = torch.full((1, 1, 1, 3), -torch.inf)
    exact = {name: x.double() if hasattr(x, "dtype") and x.is_floating_point() else x for name, x in arguments.items()}
    found = results(arguments, leaves, "composed")
    for name, x in results(exact, leaves, "reference").items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-5, msg=name)
