"""Passes that are run again: the same bits as passes that are built, and none where a pointer would be another's."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast import prefix_attention
from qtuning_fast.bench import shapes
from qtuning_fast.kernels import blocks, forward, launch
from qtuning_fast.kernels.arguments import scratch
from qtuning_fast.kernels.blocks import Blocks
from qtuning_fast.kernels.target import INTERPRETED

thorough = pytest.mark.thorough
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU every step that is tested is run again")

BASE = {"dtype": torch.float32, "B": 2, "Hkv": 1, "G": 1, "N": 5, "M": 3, "P": 4, "D": 16, "Dv": 16}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}
KINDS = {
    "whole": {},
    "no gate": {"gate": None},
    "no reweighting": {"rank_key": None, "rank_value": None},
    "half": {"dtype": torch.float16, "prefix_dtype": torch.float32},
    "padding": {"mask": "padding bool"},
    "additive mask": {"mask": "full float"},
    "bias": {"bias": True},
    "causal": {"is_causal": True},
    "bank": {"T": 2, "lengths": True, "gate_shape": "task, head"},
    "numbers for the gate": {"gate_shape": "float"},
    "one query": {"N": 1},
    "packed": {"packed": ([3, 0, 4], [3, 0, 4])},  # its offsets serve queries and keys
}
COMMON = {"whole", "padding", "bank", "packed"}


@pytest.fixture
def runs(monkeypatch):
    """Replays in the interpreter, at first none; a list that gets an entry for each pass that is run again."""
    found = []

    def counted(self, tensors):
        found.append(self)
        return run(self, tensors)

    run = launch.Replay.run
    monkeypatch.setattr(launch, "enabled", True)
    monkeypatch.setattr(launch, "_kept", {})
    monkeypatch.setattr(launch.Replay, "run", counted)
    return found


def step(arguments, inputs):
    output, lse = prefix_attention(**arguments, backend="fused", return_lse=True)
    d_output = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    return output, lse, *torch.autograd.grad(output, inputs, d_output, allow_unused=True)


def built(arguments, inputs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(launch, "enabled", False)
        return step(arguments, inputs)


def same(found, expected):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", [kind if kind in COMMON else pytest.param(kind, marks=thorough) for kind in KINDS])
def test_a_step_with_other_numbers_is_run_again(make_call, leaves, monkeypatch, runs, kind):
    for seed in range(4):
        arguments = make_call(**BASE | WHOLE | KINDS[kind], seed=seed)
        if kind == "packed":
            arguments["cu_seqlens_key"] = arguments["cu_seqlens_query"]
        inputs = list(leaves(arguments).values())
        assert same(step(arguments, inputs), built(arguments, inputs, monkeypatch))
        assert len(runs) == 2 * max(seed - 1, 0)  # a forward and a backward pass each; the second time it was recorded


@thorough
def test_what_decides_about_launches_is_told_apart(make_call, leaves, monkeypatch, runs):
    """Not one of these may be taken for another, though all come three times."""
    calls = [make_call(**BASE | WHOLE | changes) for changes in KINDS.values()]
    calls += [make_call(**BASE | WHOLE), make_call(**BASE | WHOLE, scale=0.5), make_call(**BASE | WHOLE, gate="relu")]
    calls += [make_call(**BASE | WHOLE | {"n_shared": 1}), make_call(**BASE | WHOLE | {"N": 4, "M": 4})]
    for frozen in ("query", "prefix_key"):
        calls.append(make_call(**BASE | WHOLE))
        calls[-1][frozen] = calls[-1][frozen].detach()
    inputs = [list(leaves(arguments).values()) for arguments in calls]
    expected = [built(*each, monkeypatch) for each in zip(calls, inputs)]
    for _ in range(3):
        assert all(same(step(*each), want) for *each, want in zip(calls, inputs, expected))
    assert len(runs) == 2 * len(calls) + 8  # "whole" is there once more, and twice more its forward pass


def test_one_tensor_in_two_places_and_copies_are_not_run_again(make_call, leaves, monkeypatch, runs):
    twice = make_call(**BASE | WHOLE)
    twice["value"] = twice["key"]
    copied = make_call(**BASE | WHOLE)
    copied["query"] = copied["query"].detach().mT.contiguous().mT.requires_grad_()
    for arguments in (twice, copied) * 3:
        inputs = list(leaves(arguments).values())
        assert same(step(arguments, inputs), built(arguments, inputs, monkeypatch))
    assert not runs


def test_a_tensor_that_no_one_knows_keeps_a_pass_from_being_run_again(make_call, monkeypatch, runs):
    call = shapes.inputs(shapes.TINY, dtype=torch.float32, device="cpu").call(shapes.TINY, reweighted=False)
    outputs = forward.empty_outputs(call)

    def launches():
        launch = forward.launch(call, *outputs)
        unknown = torch.ones_like(outputs[1])
        launch.arguments["per_query"] = launch.arguments["per_query"]._replace(rest=unknown)
        yield launch

    for _ in range(3):
        launch.run("by hand", call, outputs, launches)
    assert not runs
    monkeypatch.setattr(torch, "ones_like", lambda x: scratch(x, x.shape, x.dtype))
    for _ in range(3):
        launch.run("by hand, marked", call, outputs, launches)
    assert len(runs) == 1


def test_other_blocks_are_other_launches(make_call, leaves, runs):
    arguments = make_call(**BASE | WHOLE)
    inputs = list(leaves(arguments).values())
    for _ in range(3):
        step(arguments, inputs)
    assert len(runs) == 2
    entry = Blocks("interpreter", 4, 64, "forward", queries=16, keys=16, prefix=16, warps=4, stages=1)
    for _ in range(2):
        with blocks.instead(entry):
            step(arguments, inputs)
    step(arguments, inputs)
    assert len(runs) == 2


def test_passes_are_forgotten_when_there_are_too_many(make_call, leaves, monkeypatch, runs):
    monkeypatch.setattr(launch, "MOST_PASSES", 2)
    for N in (3, 4, 3):
        arguments = make_call(**BASE | {"N": N})
        step(arguments, list(leaves(arguments).values()))
        assert len(launch._kept) == 2 and not runs


def test_what_comes_once_is_not_recorded(make_call, leaves, runs):
    """In decoding each token sees one more key."""
    for M in range(3, 7):
        arguments = make_call(**BASE | {"M": M})
        step(arguments, list(leaves(arguments).values()))
    assert not runs and not any(isinstance(kept, launch.Replay) for kept in launch._kept.values())


def test_nothing_is_kept_in_the_interpreter_unless_told():
    assert not launch.enabled
