"""dk and dv of the context; the prefix's gradients in parts, whose shares add up to the whole."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.kernels import arguments, backward_keys
from qtuning_fast.kernels.arguments import PerQuery
from qtuning_fast.kernels.backward_keys import empty_parts
from qtuning_fast.kernels.forward import forward
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BASE = {"dtype": torch.float32, "B": 2, "Hkv": 1, "G": 2, "N": 5, "M": 7, "P": 3, "D": 16, "Dv": 24}
ALL = {"key": True, "value": True, "gate": True}


@pytest.fixture
def computed(checked, gradient_at):
    """The call, dk, dv and the parts, all filled with NaN before."""

    def compute(**options):
        call = checked(**BASE | options)
        output, lse, rest = forward(call)
        d_output = gradient_at(call)
        per_query = PerQuery(lse, rest, (d_output * output).sum(-1))
        d_key, d_value = (torch.full_like(x, torch.nan).detach() for x in (call.key, call.value))
        parts = empty_parts(call, "keys", **ALL)
        for part in parts[:4]:
            part.fill_(torch.nan)
        shared = arguments.attention(call)
        backward_keys.launch(call, shared, d_output, per_query, d_key, d_value, parts).run()
        return call, d_key, d_value, parts

    return compute


@pytest.mark.parametrize(
    "options",
    [
        {"gate_shape": "head"},
        {"gate_shape": "head", "is_causal": True, "M": 9},
        {"gate_shape": "task, head", "T": 2, "B": 3},
        {"gate_shape": "scalar", "N": 18, "M": 17, "P": 17, "mask": "padding bool"},
    ],
    ids=str,
)
def test_keys_values_and_sums_of_parts_are_the_definitions(computed, gradient_at, by_definition, options):
    call, d_key, d_value, parts = computed(**options)
    _, _, exact = by_definition(call, gradient_at(call))
    close = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(d_key.double(), exact["key"], **close)
    torch.testing.assert_close(d_value.double(), exact["value"], **close)
    for name, part in (("prefix_key", parts.key), ("prefix_value", parts.value)):
        total = part.double().sum(0).unflatten(1, (call.key.shape[1], -1)).sum(2)  # shares, and G heads of a group
        torch.testing.assert_close(total.reshape(exact[name].shape), exact[name], **close)
    for name, part in (("gate_alpha", parts.alpha), ("gate_tau", parts.tau)):
        total = part.double().sum((0, 3))  # [T, Hq]
        expected = exact[name]
        total = total.sum_to_size((1,) * (2 - expected.ndim) + expected.shape).reshape(expected.shape)
        torch.testing.assert_close(total, expected, **close)


def test_what_is_not_needed_has_no_room(checked):
    call = checked(**BASE)
    parts = empty_parts(call, "keys", key=False, value=True, gate=False)
    assert parts.needed and parts.key is parts.alpha is parts.tau is None and parts.value is not None
    assert not empty_parts(call, "keys", key=False, value=False, gate=False).needed


def test_shares_are_as_many_as_there_are_query_tiles_and_programs(checked, monkeypatch):
    call = checked(**BASE | {"B": 5, "N": 2})
    assert empty_parts(call, "keys", **ALL).shares == 5
    monkeypatch.setattr(backward_keys, "PROGRAMS", 4)
    assert empty_parts(call, "keys", **ALL).shares == 2  # of two heads each
    bank = checked(**BASE | {"B": 5, "N": 2, "T": 9})
    assert empty_parts(bank, "keys", **ALL).shares == 1
    assert empty_parts(bank, "keys", **ALL).key.shape == (1, 9, 2, 3, 16)


def test_the_bits_do_not_depend_on_who_came_first(computed):
    first, again = (computed(gate_shape="head", N=40)[1:] for _ in range(2))
    for x, y in zip([*first[:2], *first[2][:4]], [*again[:2], *again[2][:4]]):
        assert torch.equal(x, y)
