"""The context part: how it is cut into pieces, and the masks that a vendor gets."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast import prefix_attention
from qtuning_fast.attention import composed
from qtuning_fast.attention.composed import context
from qtuning_fast.attention.composed.pieces import pieces
from qtuning_fast.attention.composed.vendors import vendor_for

LONG = {"dtype": torch.float32, "B": 2, "Hkv": 2, "G": 2, "N": 70, "M": 70, "P": 40, "D": 16, "Dv": 16}


def results(arguments, leaves, backend):
    """Output, log-sum-exp and every gradient, by name, in float64."""
    named = leaves(arguments)
    output, lse = prefix_attention(**arguments, backend=backend, return_lse=True)
    d_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(
        output, list(named.values()), d_output.to(output), allow_unused=True, materialize_grads=True
    )
    return {name: x.double() for name, x in {"output": output, "lse": lse, **dict(zip(named, found))}.items()}


def attention_of(call):
    """What a vendor gets for a call that is one piece."""
    (part,) = context._parts(call, pieces(call, vendor_for(call)))
    return part.x


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
    arguments = make_call(**LONG | {"N": N, "M": M, "P": 3, "is_causal": True} | PREFIXES[prefix])
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


def test_queries_that_see_no_context_attend_to_the_prefix_whatever_the_vendor_says(make_call, call_of, monkeypatch):
    """The vendor's log-sum-exp and output are made garbage there."""
    arguments = make_call(**LONG | {"mask": "padding bool"})
    arguments["attn_mask"][0] = False
    vendor = vendor_for(call_of(arguments))

    def garbage(x):
        output, lse = vendor.forward(x)
        output[0], lse[0] = torch.nan, torch.inf
        return output, lse

    expected, expected_lse = prefix_attention(**arguments, backend="reference", return_lse=True)
    monkeypatch.setattr(composed, "_vendor", lambda call: type(vendor)(**vars(vendor) | {"forward": garbage}))
    output, lse = prefix_attention(**arguments, backend="composed", return_lse=True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), [arguments["query"], arguments["key"]]))


def test_a_mask_that_was_expanded_is_not_written_out(make_call, call_of):
    mask = torch.zeros(1, 1, 1, 70).expand(2, 4, 70, 70)
    call = call_of(make_call(**LONG) | {"attn_mask": mask})
    assert attention_of(call).mask.shape == (1, 1, 1, 70)
    output = prefix_attention(**make_call(**LONG) | {"attn_mask": mask}, backend="composed")
    assert torch.equal(
        output, prefix_attention(**make_call(**LONG) | {"attn_mask": mask[:1, :1, :1]}, backend="composed")
    )


def test_masks_of_moderate_size_reach_a_vendor_as_they_are(make_call, call_of):
    """What is taken off would be rounded, where a vendor adds masks in 16 bits."""
    mask = torch.tensor([5.03125, -3.015625, -torch.inf, 255.0]).expand(3, 4).clone()
    call = call_of(make_call(N=3, M=4, dtype=torch.bfloat16) | {"attn_mask": mask[None, None].bfloat16()})
    assert torch.equal(attention_of(call).mask, mask[None, None].bfloat16().float())
