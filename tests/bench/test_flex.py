"""FlexAttention computes the operator, with the gate as its score_mod and with the prefix merged by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention

from qtuning_fast.bench import flex
from qtuning_fast.bench.accuracy import Reference, check
from qtuning_fast.bench.peers import PEERS, Peer
from qtuning_fast.bench.shapes import SHAPES, TINIES, TINY, inputs

CLOSE = 1e-5  # float32 against float64: a hundred times its eps


def errors_of(peer, shape):
    errors = {}
    check(peer, Reference(shape, inputs(shape, dtype=torch.float32, device="cpu")), errors, training=shape.trained)
    return errors


def plain_context(call, block_mask):
    """Attention over the context with its log-sum-exp, in place of FlexAttention, which gives none on a CPU."""
    G = call.query.shape[1] // call.key.shape[1]
    key, value = (x.repeat_interleave(G, dim=1) for x in (call.key, call.value))
    s = call.query @ key.mT * call.scale
    if call.is_causal:
        s = s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return s.softmax(-1) @ value, s.logsumexp(-1)


@pytest.mark.parametrize("name", ["tiny", "tiny-causal", "tiny-mixed"])
def test_context_and_prefix_are_merged_as_they_should_be(name):
    peer = Peer("", lambda call: flex.merged(plain_context, call, None))
    errors = errors_of(peer, SHAPES[name])
    assert len(errors) == 12 and max(errors.values()) < CLOSE


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", TINIES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", ["flex", "flex-frozen-gate", "flex-approx-frozen-gate"])
def test_flex_attention_computes_the_operator(name, shape, monkeypatch):
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    monkeypatch.setattr(flex, "compiled", lambda function: function)  # the logic is what is tested
    errors = {}
    check(PEERS[name], Reference(shape, inputs(shape, dtype=torch.float32, device="cpu")), errors, training=False)
    assert errors["output"] < CLOSE


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_takes_one_gate_for_all_heads(monkeypatch):
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    monkeypatch.setattr(flex, "compiled", lambda function: function)
    call = inputs(TINY, dtype=torch.float32, device="cpu").call(TINY)
    call = replace(call, gate_alpha=call.gate_alpha[0], gate_tau=call.gate_tau[0])
    torch.testing.assert_close(PEERS["flex"].attend(call), PEERS["eager"].attend(call))


def test_a_package_that_is_missing_is_named_at_once(monkeypatch):
    monkeypatch.setattr(flex, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package flash_attn"):
        errors_of(PEERS["flex-flash"], TINY)


def test_the_tanh_of_a_gpu_has_a_gradient():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flex.tanh_approx, (x,)) and torch.equal(flex.tanh_approx(x), torch.tanh(x))
