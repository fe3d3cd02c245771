"""The peers compute what they say they do, on every kind of shape."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from qtuning_fast.bench import flex, peers
from qtuning_fast.bench.accuracy import Reference, check, prepare
from qtuning_fast.bench.peers import PEERS, Peer
from qtuning_fast.bench.shapes import SHAPES, TINIES, TINY, Shape, inputs

ON_CPU = [
    *(
        "composed",
        "composed-no-gate",
        "composed-no-reweighting",
        "composed-plain",
        "composed-prefix-only",
        "composed-frozen-gate",
    ),
    *("reference", "eager", "sdpa", "sdpa-no-concat"),
]
IN_THE_INTERPRETER = ["fused", "fused-plain", "fused-prefix-only", "fused-frozen-gate"]
CLOSE = 1e-5  # float32 against float64: a hundred times its eps


def errors_of(peer: Peer, shape: Shape, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    errors = {}
    check(peer, Reference(shape, inputs(shape, dtype=dtype, device=device)), errors, training=shape.trained)
    return errors


def expected_names(name: str, shape: Shape) -> set[str]:
    if not shape.trained:
        return {"output"}
    peer, names = PEERS[name], {"output", "prefix_key", "prefix_value"}
    names |= set() if "prefix-only" in name else {"query", "key", "value"}
    names |= {"U_key", "V_key", "U_value", "V_value"} if peer.reweighted else set()
    return names | ({"gate_alpha", "gate_tau"} if peer.gated and "frozen-gate" not in name else set())


@pytest.mark.parametrize("shape", TINIES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", ON_CPU)
def test_peers_agree_with_the_reference(name, shape):
    if any(getattr(shape, feature) for feature in PEERS[name].lacks):
        with pytest.raises(NotImplementedError, match="not with"):
            errors_of(PEERS[name], shape)
        return
    errors = errors_of(PEERS[name], shape)
    assert errors.keys() == expected_names(name, shape) and max(errors.values()) < CLOSE


@pytest.mark.parametrize(
    "shape", [s for s in TINIES if s.name in ("tiny-causal", "tiny-mixed", "tiny-packed")], ids=lambda s: s.name
)
@pytest.mark.parametrize("name", IN_THE_INTERPRETER)
def test_the_kernels_agree_with_the_reference(name, shape):
    small = Shape(**(vars(shape) | {"B": 2 if shape.packed else shape.tasks}))  # the interpreter takes its time
    errors = errors_of(PEERS[name], small)
    assert errors.keys() == expected_names(name, small) and max(errors.values()) < CLOSE


def test_what_belongs_to_no_gate_has_no_gradient():
    x = inputs(TINY, dtype=torch.float32, device="cpu")
    assert "gate_alpha" not in prepare(PEERS["sdpa"], TINY, x, training=True).leaves
    assert prepare(PEERS["composed-prefix-only"], TINY, x, training=True).leaves.keys() >= {"U_key", "prefix_key"}
    assert prepare(PEERS["context-alone"], TINY, x, training=True).leaves.keys() == {"query", "key", "value"}


def test_what_is_frozen_requires_no_gradient_inside_the_call():
    """Else FlexAttention would add up a gradient that no one asked for, an atomic addition a score."""
    x, seen = inputs(TINY, dtype=torch.float32, device="cpu"), []
    for name in ("flex", "flex-frozen-gate"):
        peer = replace(PEERS[name], attend=seen.append)
        leaves = prepare(peer, TINY, x, training=True).leaves
        prepare(peer, TINY, x, training=True).forward()
        assert ("gate_alpha" in leaves) == seen[-1].gate_alpha.requires_grad == (name == "flex")
        assert seen[-1].prefix_key.requires_grad and "prefix_key" in leaves


def test_a_peer_says_what_it_trains():
    said = {name: PEERS[name].trains for name in ("fused", "fused-frozen-gate", "sdpa", "context-alone")}
    assert said["fused"] == "query, key, value, prefix, U, V, alpha, tau"
    assert said["fused-frozen-gate"] == said["sdpa"] == "query, key, value, prefix, U, V"
    assert said["context-alone"] == "query, key and value"


@pytest.mark.parametrize(
    "name",
    [
        "flex",
        *(
            pytest.param(name, marks=pytest.mark.thorough)
            for name in ("flex-approx-frozen-gate", "flex-merged", "eager-compiled")
        ),
    ],
)
def test_a_compiler_can_follow_it(name, monkeypatch):
    """Without its code generator, which knows no FlexAttention with a log-sum-exp on a CPU."""
    traced = cache(lambda function: torch.compile(function, backend="eager", fullgraph=True, dynamic=False))
    monkeypatch.setattr(flex, "compiled", traced)
    for shape in (shape for shape in TINIES if not any(getattr(shape, feature) for feature in PEERS[name].lacks)):
        torch._dynamo.reset()
        errors = {}
        check(PEERS[name], Reference(shape, inputs(shape, dtype=torch.float32, device="cpu")), errors, training=False)
        assert errors["output"] < CLOSE


@pytest.mark.parametrize(("name", "shape"), [("context-alone", "tiny-padded"), ("sdpa-cudnn", "tiny-causal")])
def test_what_cannot_be_computed_is_refused(name, shape):
    with pytest.raises(NotImplementedError):
        errors_of(PEERS[name], SHAPES[shape])


def test_ours_is_called_as_users_call_it(monkeypatch):
    seen = {}
    monkeypatch.setattr(peers, "prefix_attention", lambda **arguments: seen.update(arguments))
    shape = SHAPES["tiny-padded"]
    peers.own("composed", inputs(shape, dtype=torch.float32, device="cpu").call(shape))
    assert seen["backend"] == "composed" and seen["padding_mask"].shape == (3, 24) and seen["attn_mask"] is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*ON_CPU, *IN_THE_INTERPRETER])
def test_peers_agree_with_the_reference_on_a_gpu(name):  # others are compiled for long, and checked when they are timed
    shape = Shape(**(vars(SHAPES["bert-base"]) | {"B": 2}))
    assert max(errors_of(PEERS[name], shape, device="cuda", dtype=torch.bfloat16).values()) < 0.05
