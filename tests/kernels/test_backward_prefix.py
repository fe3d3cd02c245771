"""The prefix's parts added up: dk', dK = dk' ∘ W, dα and dτ."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.kernels import backward_prefix
from qtuning_fast.kernels.backward_keys import Parts
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU that is there: test_fused_gpu.py")

BASE = {"dtype": torch.float32, "B": 2, "Hkv": 2, "G": 3, "N": 2, "M": 2, "P": 5, "D": 24, "Dv": 16, "n_shared": 2}
SHARES, TILES = 3, 2


def random_parts(T, D=24, Dv=16, Hq=6, P=5):
    generator = torch.Generator().manual_seed(0)
    shapes = (P, D), (P, Dv), (TILES,), (TILES,)
    return Parts(*(torch.randn(SHARES, T, Hq, *shape, generator=generator) for shape in shapes), SHARES, TILES)


def by_head(parts):
    """[shares, T, Hq, P, D] -> [T, Hkv, P, D]."""
    return parts.sum(0).unflatten(1, (2, 3)).sum(2)


@pytest.mark.parametrize("bank", [{}, {"T": 4, "gate_shape": "task, head"}], ids=["one", "bank"])
def test_rows_are_summed_and_weighted(checked, bank):
    call = checked(**BASE | bank, rank_key=2)
    T = bank.get("T", 1)
    parts = random_parts(T)
    total_key = torch.full((T, 2, 5, 24), torch.nan)
    gradients = {
        name: torch.full_like(getattr(call, name), torch.nan).detach() for name in ("prefix_key", "prefix_value")
    }
    backward_prefix.launch(call, parts, gradients, total_key, None).run()
    torch.testing.assert_close(total_key, by_head(parts.key))
    U, V = (x.detach().reshape(T, *x.shape[-n:]) for x, n in zip(call.reweight_key, (2, 3)))
    W = torch.einsum("tpr,trhd->thpd", U, V)
    W[:, :, : call.n_shared] = 1
    torch.testing.assert_close(gradients["prefix_key"].reshape(total_key.shape), W * by_head(parts.key))
    torch.testing.assert_close(gradients["prefix_value"].reshape(T, 2, 5, 16), by_head(parts.value))


@pytest.mark.parametrize(
    ("shape", "T", "kept"),
    [("scalar", None, ()), ("head", None, (6,)), ("task", 4, (4, 1)), ("task, head", 4, (4, 6))],
)
def test_an_entry_of_the_gate_is_the_sum_over_all_that_share_it(checked, shape, T, kept):
    call = checked(**BASE | {"T": T, "gate_shape": shape})
    parts = random_parts(T or 1)
    gradients = {"gate_alpha": torch.full(kept, torch.nan), "gate_tau": torch.full(kept, torch.nan)}
    only_gate = parts._replace(key=None, value=None)
    launch = backward_prefix.launch(call, only_gate, gradients, None, None)
    assert launch.programs == 2 * max(gradients["gate_tau"].numel(), 1)
    launch.run()
    for name, part in (("gate_alpha", parts.alpha), ("gate_tau", parts.tau)):
        total = part.sum((0, 3))
        expected = total.sum_to_size((1,) * (2 - len(kept)) + kept).reshape(kept)
        torch.testing.assert_close(gradients[name], expected, rtol=1e-5, atol=1e-5)


def test_rows_beyond_a_prefixs_length_get_no_gradient_by_weights(checked):
    """Their weights are zeros: whatever is in U there, NaN included, is not read."""
    call = checked(**BASE | {"T": 2}, rank_key=1, lengths=True)
    call.prefix_length.copy_(torch.tensor([3, 5]))
    call.reweight_key[0].detach()[0, 3:] = torch.nan
    gradient = torch.full_like(call.prefix_key, torch.nan).detach()
    backward_prefix.launch(call, random_parts(2), {"prefix_key": gradient}, None, None).run()
    assert (gradient[0, :, 3:] == 0).all() and gradient.isfinite().all()
