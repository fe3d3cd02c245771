"""The prefix on a CPU. How exact it is: tests/attention/test_accuracy.py."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast import prefix_attention
from qtuning_fast.attention.composed.cpu import prefix_part

LONG = {"dtype": torch.float32, "B": 2, "Hkv": 2, "G": 2, "N": 70, "M": 70, "P": 40, "D": 16, "Dv": 16}
TRAINED = {"rank_key": 1, "rank_value": 1, "gate_shape": "head"}


@pytest.mark.parametrize("samples", [[0, 1, 2, 3, 4, 5], [0, 2, 4, 1, 3, 5]])
def test_samples_of_mixed_tasks_are_stacked_by_task(make_call, gradients, monkeypatch, samples):
    """In whatever order they come, each prefix is multiplied once."""
    arguments = make_call(**LONG | TRAINED | {"B": 6, "N": 2, "T": 2, "bias": True}) | {"backend": "composed"}
    arguments["prefix_index"] = torch.tensor([0, 0, 0, 1, 1, 1])[samples]
    products = []
    original = torch.Tensor.baddbmm_
    monkeypatch.setattr(torch.Tensor, "baddbmm_", lambda *a, **k: products.append(a) or original(*a, **k))
    output = prefix_attention(**arguments)
    assert len(products) == 2
    expected = prefix_attention(**arguments | {"backend": "reference"})
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    d_output = torch.ones_like(output)
    found, exact = gradients(arguments, d_output), gradients(arguments | {"backend": "reference"}, d_output)
    for name in exact:
        torch.testing.assert_close(found[name], exact[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [None, "padding bool", "padding float", "full float"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_rest_is_kept_where_numbers_are_added(make_call, call_of, mask, bias):
    call = call_of(make_call(**LONG | {"mask": mask, "bias": bias}))
    assert prefix_part.keeps_rest(call) == (bias or "float" in (mask or ""))
