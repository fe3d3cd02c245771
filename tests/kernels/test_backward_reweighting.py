"""dU and dV from dk' and dv'."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.kernels import backward_reweighting
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BASE = {"dtype": torch.float32, "B": 2, "Hkv": 2, "G": 1, "N": 2, "M": 2, "P": 5, "D": 24, "Dv": 16, "n_shared": 2}


@pytest.mark.parametrize("bank", [{}, {"T": 3, "lengths": True}], ids=["one", "bank"])
@pytest.mark.parametrize("names", [("U_key", "V_key", "U_value", "V_value"), ("V_key",), ("U_value",)], ids=str)
def test_both_are_the_definitions(checked, names, bank):
    call = checked(**BASE | bank, rank_key=1, rank_value=2)
    T = bank.get("T", 1)
    if bank:
        call.prefix_length.copy_(torch.tensor([5, 3, 0]))
    stored = torch.arange(5) < (call.prefix_length[:, None] if bank else torch.full((1, 1), 5))
    reweighted = (stored & (torch.arange(5) >= 2))[:, None, :, None]  # [T, 1, P, 1]
    gradients, totals, expected = {}, {}, {}
    for side, rows, pair in (
        ("key", call.prefix_key, call.reweight_key),
        ("value", call.prefix_value, call.reweight_value),
    ):
        totals[side] = torch.randn(T, *rows.shape[-3:], generator=torch.Generator().manual_seed(1))
        product = (totals[side] * rows.detach().reshape(totals[side].shape)).where(reweighted, 0)  # dk' ∘ K
        U, V = (x.detach().reshape(T, *x.shape[-n:]) for x, n in zip(pair, (2, 3)))
        expected |= {f"U_{side}": torch.einsum("thpd,trhd->tpr", product, V)}
        expected |= {f"V_{side}": torch.einsum("thpd,tpr->trhd", product, U)}
        gradients |= {f"{name}_{side}": torch.full_like(x, torch.nan).detach() for name, x in zip("UV", pair)}
    wanted = {name: gradients[name] for name in names}
    backward_reweighting.launch(call, wanted, totals["key"], totals["value"]).run()
    for name, found in wanted.items():
        torch.testing.assert_close(found, expected[name].reshape(found.shape), rtol=1e-5, atol=1e-5)


def test_there_are_programs_for_what_is_needed_alone(checked):
    call = checked(**BASE, rank_key=3)
    total = torch.zeros(1, 2, 5, 24)
    U, V = (torch.empty_like(x) for x in call.reweight_key)
    for gradients, programs in ({"U_key": U}, 5 * 3), ({"V_key": V}, 3 * 2 * 2), ({}, 0):  # V: two blocks of columns
        assert backward_reweighting.launch(call, gradients, total, None).programs == programs
