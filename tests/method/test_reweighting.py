"""The low-rank weights of older rows."""

import pytest
import torch

from qtuning_fast.method.reweighting import Reweighting


@pytest.mark.parametrize("rank", [1, 3])
def test_weights_start_at_the_scale_of_the_rows(rank: int) -> None:
    scale = torch.tensor([1.0, 0.25, 1.0, 0.5])
    weighting = Reweighting(scale, heads=2, width=3, rank=rank)
    assert torch.equal(weighting(), scale[None, :, None].expand(2, 4, 3))
    assert weighting.U.shape == (4, rank) and weighting.V.shape == (rank, 2, 3)
    if rank > 1:  # further components must be able to leave zero, and to differ
        assert (weighting.U[:, 1:] != 0).all() and not torch.equal(weighting.U[:, 1], weighting.U[:, 2])


def test_weights_are_the_product_of_their_factors() -> None:
    weighting = Reweighting(torch.ones(4), heads=2, width=3, rank=2)
    for parameter in weighting.parameters():
        torch.nn.init.normal_(parameter)
    torch.testing.assert_close(weighting(), torch.stack([weighting.U @ weighting.V[:, h] for h in range(2)]))
