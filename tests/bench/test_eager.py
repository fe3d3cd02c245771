"""Plain PyTorch computes the operator; its pieces put the reweighted prefix in front of the context."""

import pytest
import torch

from qtuning_fast.bench import eager, peers
from qtuning_fast.bench.shapes import TINIES, TINY, TINY_MIXED, inputs


@pytest.mark.parametrize("shape", [s for s in TINIES if not s.packed], ids=lambda shape: shape.name)
def test_it_agrees_with_the_definition(shape):
    call = inputs(shape, dtype=torch.float64, device="cpu").call(shape)
    torch.testing.assert_close(
        eager.attend(call), peers.own("reference", call), rtol=1e-5, atol=1e-5
    )  # its softmax is float32


def test_the_shared_rows_of_a_prefix_are_not_reweighted():
    call = inputs(TINY, dtype=torch.float32, device="cpu").call(TINY)
    rows = eager.prefix_rows(call, call.prefix_key, call.reweight_key)
    assert torch.equal(rows[:, : call.n_shared], call.prefix_key[:, : call.n_shared])
    assert not torch.isclose(rows[:, call.n_shared :], call.prefix_key[:, call.n_shared :]).all()
    key, value = eager.concatenated(call)
    assert key.shape == value.shape == (TINY.B, TINY.Hkv, TINY.P + TINY.M, TINY.D)
    assert torch.equal(key[1, :, TINY.P :], call.key[1]) and torch.equal(key[1, :, : TINY.P], rows)


def test_each_sample_has_the_prefix_and_the_gate_of_its_task():
    call = inputs(TINY_MIXED, dtype=torch.float32, device="cpu").call(TINY_MIXED)
    rows = eager.prefix_rows(call, call.prefix_key, None)
    assert torch.equal(rows, call.prefix_key[call.prefix_index])
    per_task = torch.arange(2.0)[:, None].expand(2, TINY_MIXED.Hq)
    assert torch.equal(eager.per_head(call, per_task)[:, 0, 0, 0], call.prefix_index.float())
    assert eager.per_head(call, 2.0) == 2.0
