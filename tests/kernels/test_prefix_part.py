"""The prefix's part by kernels: launches, layouts, determinism. How exact it is: tests/attention/test_accuracy.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtuning_fast.attention.arguments import INPUTS
from qtuning_fast.kernels import prefix_part
from qtuning_fast.kernels.backward import rooms
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="shapes and precisions are those of the interpreter")

OF_THE_PREFIX = [name for name in INPUTS[3:] if name != "sink"]
BASE = {"dtype": torch.float32, "B": 2, "Hkv": 1, "G": 2, "N": 9, "M": 7, "P": 5, "D": 16, "Dv": 16}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}
DECODE = {"B": 5, "N": 1, "G": 4, "M": 3}
BANK = {"B": 6, "T": 7, "lengths": True, "gate_shape": "task, head"}


@pytest.fixture
def make(checked):
    return lambda **options: checked(**BASE | options)


@pytest.fixture
def run(context_alone, gradient_at):
    """All that the prefix's part writes, in tensors that `part_of` lays out."""

    def run(call, part_of=lambda x: x):
        output, lse = context_alone(call)
        output = part_of(output)
        lse_rest = torch.zeros_like(lse) if prefix_part.keeps_rest(call) else torch.empty(0)
        prefix_part.merge(call, output, lse, lse_rest)
        d_query = part_of(torch.ones_like(call.query).detach())
        needed = [name for name in OF_THE_PREFIX if getattr(call, name) is not None]
        found = prefix_part.backward(call, output, lse, lse_rest, part_of(gradient_at(call)), d_query, needed)
        return [output, lse, lse_rest, d_query, *found]

    return run


def as_models_do(x):
    """The same numbers as a part of [B, N, H, D + 3], in memory."""
    B, H, N, D = x.shape
    return x.new_full((B, N, H, D + 3), torch.nan).transpose(1, 2)[..., 1 : D + 1].copy_(x)


def test_any_layout_is_written_in_place(make, run):
    call = make(**WHOLE | BANK | {"B": 3, "T": 2, "Hkv": 2, "D": 24})
    plain = run(call)
    strided = run(replace(call, query=as_models_do(call.query.detach())), as_models_do)
    assert all(torch.equal(x, y) for x, y in zip(plain, strided, strict=True))


def test_the_same_bits_again(make, run):
    call = make(**WHOLE | BANK | DECODE | {"T": 2}, mask="padding bool")
    assert all(torch.equal(x, y) for x, y in zip(run(call), run(call), strict=True))


def test_an_index_out_of_range_is_clamped(make, run):
    call = make(**BANK | {"T": 3, "B": 4})
    outside, clamped = torch.tensor([7, 1, -5, 2]), torch.tensor([2, 1, 0, 2])
    found, expected = (run(replace(call, prefix_index=index)) for index in (outside, clamped))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_query_that_sees_nothing_stays_as_it_is(make, run):
    call = make(P=0, M=5, is_causal=True)
    output, lse, _, d_query, *_ = run(call)
    assert torch.equal(output[:, :, :4], torch.zeros(2, 2, 4, 16)) and lse[:, :, :4].isneginf().all()
    assert torch.equal(d_query, torch.ones_like(d_query)) and lse[:, :, 4:].isfinite().all()


@pytest.mark.parametrize(
    ("needed", "launched"),
    [
        (set(), []),
        ({"query"}, ["fold", "prefix_queries"]),
        ({"key", "value"}, []),
        ({"prefix_value"}, ["fold", "prefix_queries", "backward_keys", "backward_prefix"]),
        (set(INPUTS), ["fold", "prefix_queries", "backward_keys", "backward_prefix", "backward_reweighting"]),
    ],
    ids=lambda x: "-".join(sorted(x)) if isinstance(x, set) else "",
)
def test_only_what_is_needed_is_launched(make, context_alone, needed, launched):
    call = make(**WHOLE)
    output, lse = context_alone(call)
    gradients = rooms(call, [name for name in OF_THE_PREFIX if name in needed])
    d_query = torch.zeros_like(call.query) if "query" in needed else None
    launches = list(prefix_part.launches(call, output, lse, lse, output, d_query, gradients))
    assert [launch.kernel.fn.__name__.removesuffix("_kernel") for launch in launches] == launched
    for keys in launches[2:3]:
        assert keys.programs == keys.arguments["prefix_programs"] > 0


def test_gradients_do_not_depend_on_the_queries_needing_one(make, context_alone, gradient_at):
    call = make(**WHOLE)
    output, lse = context_alone(call)
    lse_rest = torch.zeros_like(lse) if prefix_part.keeps_rest(call) else torch.empty(0)
    prefix_part.merge(call, output, lse, lse_rest)
    alone, beside = (
        prefix_part.backward(call, output, lse, lse_rest, gradient_at(call), d_query, OF_THE_PREFIX)
        for d_query in (None, torch.zeros_like(call.query))
    )
    assert len(alone) == len(OF_THE_PREFIX) and all(torch.equal(x, y) for x, y in zip(alone, beside, strict=True))
