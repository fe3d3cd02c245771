"""Attention without a gate: bottom-right causality, masks that leave the prefix visible, and refusals."""

import pytest
import torch

from qtuning_fast.bench import sdpa
from qtuning_fast.bench.eager import concatenated
from qtuning_fast.bench.shapes import TINY, TINY_BIAS, TINY_CAUSAL, TINY_PADDED, inputs


def plain(call, hidden):
    """Softmax attention over the concatenated keys, with those positions hidden."""
    G = call.query.shape[1] // call.key.shape[1]
    key, value = (x.repeat_interleave(G, dim=1) for x in concatenated(call))
    s = (call.query @ key.mT) * call.scale
    return s.masked_fill(hidden, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("shape", [TINY, TINY_CAUSAL, TINY_PADDED], ids=lambda shape: shape.name)
def test_the_prefix_is_always_seen(shape):
    call = inputs(shape, dtype=torch.float64, device="cpu").call(shape, gated=False)
    hidden = torch.zeros(shape.B, 1, shape.N, shape.P + shape.M, dtype=torch.bool)
    if shape.is_causal:
        hidden[..., shape.P :] = ~torch.ones(shape.N, shape.M, dtype=torch.bool).tril(shape.M - shape.N)
    if shape.padding:
        hidden[..., shape.P :] = ~call.padding_mask[:, None, None]
    torch.testing.assert_close(sdpa.attend(sdpa.pytorch, call), plain(call, hidden))


def test_a_mask_is_made_once_for_all_layers():
    call = inputs(TINY_PADDED, dtype=torch.float32, device="cpu").call(TINY_PADDED)
    assert sdpa._mask(call) is sdpa._mask(call) and sdpa._mask(call)[..., : TINY_PADDED.P].all()


def test_what_a_backend_cannot_do_is_refused():
    causal = inputs(TINY_CAUSAL, dtype=torch.float32, device="cpu").call(TINY_CAUSAL)
    with pytest.raises(NotImplementedError, match="bottom-right"):
        sdpa.pytorch_by("cudnn", causal, *concatenated(causal))
    biased = inputs(TINY_BIAS, dtype=torch.float32, device="cpu").call(TINY_BIAS)
    with pytest.raises(NotImplementedError, match="without a mask"):
        sdpa.context_alone(None, biased)
