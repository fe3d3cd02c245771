"""From token features to one feature vector a sample."""

import torch

from qtuning_fast.method.pooling import first_token, last_token, mean_pool


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


def test_every_number_in_a_mask_but_zero_means_a_token() -> None:
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    numbers = mask * torch.tensor([1, 2, 3, 4])  # as of packed sequences
    for pool in (mean_pool, last_token):
        for other in (numbers, numbers.bool(), numbers.float()):
            assert torch.equal(pool(hidden, other), pool(hidden, mask))


def test_a_sample_that_is_all_padding_is_zeros() -> None:
    pooled = mean_pool(torch.randn(2, 3, 4), torch.tensor([[0, 0, 0], [1, 1, 0]]))
    assert (pooled[0] == 0).all() and (pooled[1] != 0).all()


def test_features_are_float32_of_one_scale() -> None:
    hidden = 100 * torch.randn(2, 3, 64, dtype=torch.bfloat16)
    for pooled in (mean_pool(hidden, None), last_token(hidden, None), first_token(hidden)):
        assert pooled.dtype == torch.float32
        torch.testing.assert_close(pooled.square().mean(1), torch.ones(2))
