"""Sinks, merged into attention that knows nothing of them. How exact it is: tests/attention/test_accuracy.py."""

from __future__ import annotations

import torch

from qtuning_fast.attention import sink


def test_a_sink_takes_its_share_of_each_query():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    lse = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    output[0, 0, 0], lse[0, 0, 0] = 0, -torch.inf  # it sees nothing
    s = torch.tensor([0.3, -torch.inf, 50.0], dtype=torch.float64)
    merged, total = output.clone(), lse.clone()
    sink.merge(s, merged, total, torch.empty(0))
    share = 1 / (1 + (s[:, None] - lse).exp())
    torch.testing.assert_close(merged, output * share[..., None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total, torch.logaddexp(lse, s[:, None].expand_as(lse)), rtol=1e-12, atol=1e-12)
    assert (merged[0, 0, 0] == 0).all() and total[0, 0, 0] == 0.3 and torch.equal(merged[:, 1], output[:, 1])


def test_what_float32_cannot_hold_is_kept_in_the_rest():
    """Scores around -1e9, as under an additive mask, and a sink that far below: an even share."""
    lse = torch.full((1, 1, 2), -1e9)
    rest = torch.tensor([[[0.25, 3.0]]])
    s = torch.tensor([-1e9])
    output = torch.ones(1, 1, 2, 4)
    sink.merge(s, output, lse, rest)
    share = 1 / (1 + torch.tensor([-0.25, -3.0]).exp())
    torch.testing.assert_close(output[0, 0, :, 0], share, rtol=1e-6, atol=1e-6)
    expected = torch.tensor([0.25, 3.0], dtype=torch.float64).exp().add(1).log() - 1e9
    torch.testing.assert_close(lse.double() + rest.double(), expected[None, None], rtol=0, atol=1e-5)
