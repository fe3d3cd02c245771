"""From gradients of folded rows to those of what they were folded from, beside autograd."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.attention.folding import as_bank, reduced, side_of, unfolded
from qtuning_fast.attention.reference import prefix_rows, stored_rows


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("options", [{}, {"T": 3, "lengths": True}, {"rank_key": None, "rank_value": None}], ids=str)
def test_gradients_of_rows_and_weights(make_call, call_of, side, options):
    T = options.get("T", 1)
    call = call_of(make_call(**{"B": T, "rank_key": 2, "rank_value": 1, "n_shared": 2, "P": 5} | options))
    if call.prefix_index is not None:
        call.prefix_index = torch.arange(T)
    rows, weights = side_of(call, side)
    leaves = [rows, *(weights or ())]
    folded = as_bank(call, prefix_rows(call, rows, weights))
    d_rows = torch.randn(folded.shape, dtype=folded.dtype)
    if call.prefix_length is not None:  # no query sees rows beyond it
        d_rows = d_rows.where(stored_rows(call)[:, None, :, None], 0)
    expected = torch.autograd.grad(folded, leaves, d_rows)
    names = [f"prefix_{side}", f"U_{side}", f"V_{side}"]
    with torch.no_grad():
        found = unfolded(call, side, d_rows)
    assert list(found) == names[: len(leaves)]
    for name, want in zip(names, expected):
        torch.testing.assert_close(found[name], want)


def test_a_gates_gradient_has_its_parameters_shape():
    gradient = torch.arange(6.0).view(2, 3)  # [T, Hq]
    assert reduced(1.0, gradient) is gradient
    assert reduced(torch.zeros(2, 1, dtype=torch.float64), gradient).tolist() == [[3.0], [12.0]]
    assert reduced(torch.zeros(3), gradient[:1]).tolist() == [0.0, 1.0, 2.0]
    assert reduced(torch.zeros(()), gradient[:1]).item() == 3.0
