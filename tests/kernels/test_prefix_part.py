"""The prefix's part by kernels: launches, layouts, determinism. How exact it is: tests/attention/test_accuracy.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtuning_fast.attention import reference
from qtuning_fast.attention.api import call_of
from qtuning_fast.attention.arguments import INPUTS
from qtuning_fast.kernels import prefix_forward, prefix_part
from qtuning_fast.kernels.backward import rooms
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="shapes and precisions are those of the interpreter")

OF_THE_PREFIX = INPUTS[3:]
BASE = {"dtype": torch.float32, "B": 2, "Hkv": 1, "G": 2, "N": 9, "M": 7, "P": 5, "D": 16, "Dv": 16}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}
DECODE = {"B": 5, "N": 1, "G": 4, "M": 3}
BANK = {"B": 6, "T": 7, "lengths": True, "gate_shape": "task, head"}


@pytest.fixture
def make(make_call):
    """Checked calls, as backends get them."""

    def made(**options):
        call = call_of(**make_call(**BASE | options))
        return replace(call, gate_alpha=None, gate_tau=None) if call.gate is None else call

    return made


def gradient_at(call, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(call.query.dtype)


def weights_at(scores, lse):
    """exp(scores - lse); 0 where both are -inf."""
    return (scores - lse).exp().nan_to_num(0.0)


@torch.no_grad()
def context(call):
    """Attention over the context alone, as a vendor would compute it; 0 and -inf where a query sees none."""
    scores = reference._context_scores(call)
    lse = scores.logsumexp(dim=-1)
    weights = weights_at(scores, lse[..., None]).to(call.query.dtype)
    return reference._weighted_sum(weights, call.value, lse.dtype).to(call.query.dtype), lse


def run(call, part_of=lambda x: x):
    """All that the prefix's part writes, in tensors that `part_of` lays out."""
    output, lse = context(call)
    output = part_of(output)
    lse_rest = torch.zeros_like(lse) if prefix_part.keeps_rest(call) else torch.empty(0)
    prefix_part.merge(call, output, lse, lse_rest)
    d_query = part_of(torch.ones_like(call.query).detach())
    needed = [name for name in OF_THE_PREFIX if getattr(call, name) is not None]
    found = prefix_part.backward(call, output, lse, lse_rest, part_of(gradient_at(call)), d_query, needed)
    return [output, lse, lse_rest, d_query, *found]


def as_models_do(x):
    """The same numbers as a part of [B, N, H, D + 3], in memory."""
    B, H, N, D = x.shape
    return x.new_full((B, N, H, D + 3), torch.nan).transpose(1, 2)[..., 1 : D + 1].copy_(x)


def test_any_layout_is_written_in_place(make):
    call = make(**WHOLE | BANK | {"B": 3, "T": 2, "Hkv": 2, "D": 24})
    plain = run(call)
    strided = run(replace(call, query=as_models_do(call.query.detach())), as_models_do)
    assert all(torch.equal(x, y) for x, y in zip(plain, strided, strict=True))


def test_the_same_bits_again(make):
    call = make(**WHOLE | BANK | DECODE | {"T": 2}, mask="padding bool")
    assert all(torch.equal(x, y) for x, y in zip(run(call), run(call), strict=True))


def test_a_sample_does_not_see_the_order_of_the_others(make):
    call = make(**BANK | DECODE | {"B": 12})
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    samples = {name: getattr(call, name)[order] for name in ("query", "key", "value", "prefix_index")}
    whole, shuffled = context(call), context(replace(call, **samples))
    prefix_part.merge(call, *whole, torch.zeros_like(whole[1]))
    prefix_part.merge(replace(call, **samples), *shuffled, torch.zeros_like(shuffled[1]))
    for x, y in zip(whole, shuffled):
        torch.testing.assert_close(x[order], y)


def test_an_index_out_of_range_is_clamped(make):
    call = make(**BANK | {"T": 3, "B": 4})
    outside, clamped = torch.tensor([7, 1, -5, 2]), torch.tensor([2, 1, 0, 2])
    found, expected = (run(replace(call, prefix_index=index)) for index in (outside, clamped))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_query_that_sees_nothing_stays_as_it_is(make):
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
def test_only_what_is_needed_is_launched(make, needed, launched):
    call = make(**WHOLE)
    output, lse = context(call)
    gradients = rooms(call, [name for name in OF_THE_PREFIX if name in needed])
    d_query = torch.zeros_like(call.query) if "query" in needed else None
    launches = list(prefix_part.launches(call, output, lse, lse, output, d_query, gradients))
    assert [launch.kernel.fn.__name__.removesuffix("_kernel") for launch in launches] == launched
    for keys in launches[2:3]:
        assert keys.programs == keys.arguments["prefix_programs"] > 0


def test_gradients_do_not_depend_on_the_queries_needing_one(make):
    call = make(**WHOLE)
    output, lse = context(call)
    lse_rest = torch.zeros_like(lse) if prefix_part.keeps_rest(call) else torch.empty(0)
    prefix_part.merge(call, output, lse, lse_rest)
    alone, beside = (
        prefix_part.backward(call, output, lse, lse_rest, gradient_at(call), d_query, OF_THE_PREFIX)
        for d_query in (None, torch.zeros_like(call.query))
    )
    assert len(alone) == len(OF_THE_PREFIX) and all(torch.equal(x, y) for x, y in zip(alone, beside, strict=True))


@pytest.mark.parametrize(("N", "block", "programs"), [(1, 16, 1), (132 * 16, 16, 132), (132 * 64, 64, 132)])
def test_few_rows_have_small_tiles(make, N, block, programs):
    call = make(B=1, G=1, N=N, M=0)
    launch = prefix_forward.launch(call, *context(call), torch.empty(0))
    assert launch.arguments["variant"].BLOCK_N.value == block and launch.programs == programs
