"""The heads of a group as further queries of their key head."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.attention.composed.vendors.base import Attention, folded


@pytest.mark.parametrize("mask", [None, "padding", "by position", "by head", "whole"])
@pytest.mark.parametrize("N", [1, 5, 12])
def test_folding_is_attention(calls, N, mask):
    call = calls.real_call(N=N, mask=mask)
    x = Attention(call.query, call.key, call.value, calls.additive(call), False, call.scale)
    y = folded(x)
    if mask in ("by position", "by head") and N > 8:
        assert y is x
        return
    assert y.query.shape == (2, 2, 2 * N, 8) and y.key is x.key
    o, L = calls.attend(*y[:6])
    o_exact, L_exact = calls.attend(*x[:6])
    torch.testing.assert_close(o.reshape(o_exact.shape), o_exact, equal_nan=True)
    torch.testing.assert_close(L.reshape(L_exact.shape), L_exact)


def test_what_cannot_be_folded_is_left_alone(calls):
    for options in ({"Hq": 2}, {"N": 7, "is_causal": True}):
        call = calls.real_call(**options)
        x = Attention(call.query, call.key, call.value, None, call.is_causal, call.scale)
        assert folded(x) is x
