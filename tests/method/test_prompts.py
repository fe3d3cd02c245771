"""The small modules: reweighting, reparametrisation, discriminator, and the prefix of a layer."""

import math

import pytest
import torch

from qtuning_fast import prefix_attention
from qtuning_fast.method.gate import Gate
from qtuning_fast.method.pooling import first_token, last_token, mean_pool
from qtuning_fast.method.prompts import InputPrompt, LayerPrefix, LayerShape
from qtuning_fast.method.reparameterization import ResidualReparameterization
from qtuning_fast.method.retention import Discriminator, retention_loss
from qtuning_fast.method.reweighting import Reweighting

SHAPE = LayerShape(num_heads=4, num_kv_heads=2, key_size=3, value_size=5)


@pytest.mark.parametrize("rank", [1, 3])
def test_weights_start_at_the_scale_of_the_rows(rank: int) -> None:
    scale = torch.tensor([1.0, 0.25, 1.0, 0.5])
    weighting = Reweighting(scale, heads=2, width=3, rank=rank)
    assert torch.equal(weighting(), scale[None, :, None].expand(2, 4, 3))
    assert weighting.U.shape == (4, rank) and weighting.V.shape == (rank, 2, 3)
    if rank > 1:  # further components must be able to leave zero, and to differ
        assert (weighting.U[:, 1:] != 0).all() and not torch.equal(weighting.U[:, 1], weighting.U[:, 2])


def test_reparameterization_starts_as_the_identity() -> None:
    mlp = ResidualReparameterization(16)
    rows = torch.randn(2, 3, 16)
    assert torch.equal(mlp(rows), rows)
    mlp(rows).sum().backward()
    assert mlp.up.weight.grad is not None and mlp.up.weight.grad.abs().sum() > 0


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


def test_rows_go_to_heads_and_back() -> None:
    rows = torch.randn(7, SHAPE.row_features)
    key, value = SHAPE.from_rows(rows)
    assert key.shape == (2, 7, 3) and value.shape == (2, 7, 5)
    assert torch.equal(SHAPE.to_rows(key, value), rows)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("per_head", [True, False])
def test_folded_prefix_is_the_live_one(rank: int, per_head: bool) -> None:
    torch.manual_seed(0)
    prefix = LayerPrefix(SHAPE, shared_length=2, rank=rank)
    gate = Gate("tanh", SHAPE.num_heads if per_head else None)
    prefix.begin(3, torch.randn(4, SHAPE.row_features), torch.rand(4))
    for parameter in (*prefix.parameters(), *gate.parameters()):
        torch.nn.init.normal_(parameter)
    query, key, value = torch.randn(2, 4, 6, 3), torch.randn(2, 2, 5, 3), torch.randn(2, 2, 5, 5)
    live = prefix_attention(query, key, value, **prefix.arguments(prefix.prompt), **gate.arguments())
    folded_key, folded_value = prefix.folded()
    assert folded_key.shape[1] == 2 + 3 + 4
    folded = prefix_attention(query, key, value, folded_key, folded_value, **gate.arguments())
    torch.testing.assert_close(live, folded)


def test_old_rows_are_frozen_and_new_ones_start_as_the_method_says() -> None:
    torch.manual_seed(0)
    wide = LayerShape(num_heads=8, num_kv_heads=8, key_size=64, value_size=64)
    prefix = LayerPrefix(wide, shared_length=10, rank=1)
    prefix.begin(10, torch.randn(4, wide.row_features), torch.ones(4))
    key, value = wide.from_rows(prefix.prompt)
    assert key.std().item() == pytest.approx(0.5, rel=0.05) and value.std().item() == pytest.approx(0.02, rel=0.05)
    assert not prefix.old.requires_grad and prefix.prompt.requires_grad


@pytest.mark.parametrize("rank", [1, 2])
def test_embeddings_start_as_words_and_old_ones_are_reweighted(rank: int) -> None:
    torch.manual_seed(0)
    words = torch.nn.Embedding(30, 8)
    prompt = InputPrompt(words, 8, shared_length=2, rank=rank)
    old, scale = torch.randn(4, 8), torch.rand(4)
    prompt.begin(3, old, scale)
    new = torch.cat([prompt.shared, prompt.prompt])
    assert all((words.weight == row).all(1).any() for row in new)
    torch.testing.assert_close(prompt.embeddings(prompt.prompt), torch.cat([new, scale[:, None] * old]))
    assert not any(parameter is words.weight for parameter in prompt.parameters())
    without_words = InputPrompt(None, 64, shared_length=200, rank=rank)
    assert without_words.shared.std().item() == pytest.approx(0.02, rel=0.05)


def test_what_is_pooled() -> None:
    hidden = torch.randn(3, 4, 8)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    for pooled, expected in (
        (mean_pool(hidden, mask), [hidden[0, :2].mean(0), hidden[1, 2:].mean(0), hidden[2].mean(0)]),
        (last_token(hidden, mask), [hidden[0, 1], hidden[1, 3], hidden[2, 3]]),
        (first_token(hidden, mask), hidden[:, 0].unbind()),
        (last_token(hidden, None), hidden[:, -1].unbind()),
    ):
        for mine, theirs in zip(pooled, expected):
            torch.testing.assert_close(mine, theirs / theirs.square().mean().sqrt())
