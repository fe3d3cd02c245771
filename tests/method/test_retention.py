"""Memory retention: the discriminator and its loss."""

import math

import pytest
import torch

from qtuning_fast.method.retention import Discriminator, retention_loss


def test_retention_loss_of_a_discriminator_that_is_zero() -> None:
    zero = Discriminator(4)
    torch.nn.init.zeros_(zero.score[-1].weight)
    torch.nn.init.zeros_(zero.score[-1].bias)
    loss = retention_loss(zero, torch.randn(5, 4), torch.randn(5, 4), shift=2)
    assert loss.item() == pytest.approx(2 * math.log(2))


def test_retention_loss_is_the_jensen_shannon_estimate() -> None:
    torch.manual_seed(0)
    score = Discriminator(4).double()
    z_new, z_old = torch.randn(2, 5, 4, dtype=torch.float64)
    information = 0.0
    for b in range(5):
        joint, product = score(z_new[b], z_old[b]).item(), score(z_new[b], z_old[(b - 2) % 5]).item()
        information += (-math.log1p(math.exp(-joint)) - math.log1p(math.exp(product))) / 5
    assert retention_loss(score, z_new, z_old, shift=2).item() == pytest.approx(-information, abs=1e-12)


def test_retention_loss_gives_old_features_no_gradient_and_refuses_a_shift_of_nothing() -> None:
    z_new, z_old = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    retention_loss(Discriminator(4), z_new, z_old, shift=1).backward()
    assert z_new.grad is not None and z_old.grad is None
    for shift in (0, 3):
        with pytest.raises(ValueError, match="shift"):
            retention_loss(Discriminator(4), z_new, z_old, shift=shift)
