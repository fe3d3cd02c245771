"""The backward pass in one launch: which calls take it, and what it stands for."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.attention.arguments import trainable
from qtuning_fast.kernels import backward, backward_whole
from qtuning_fast.kernels.blocks import Blocks, instead
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the blocks are the interpreter's")
BASE = {"B": 2, "Hkv": 1, "G": 2, "N": 17, "M": 15, "P": 5, "D": 16, "Dv": 16, "dtype": torch.float32}
WHOLE = {"rank_key": 1, "rank_value": 2, "n_shared": 2, "gate_shape": "head"}
BLOCKS = Blocks("interpreter", 4, 256, "whole", queries=16, keys=64, prefix=64, warps=1, stages=1)


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    """Every call that may be is computed so."""
    monkeypatch.setattr(backward_whole, "MULTIPROCESSORS", 1)
    with instead(BLOCKS):
        yield


def launched(call, needed=None):
    gradients = backward.rooms(call, trainable(call) if needed is None else needed)
    output = torch.empty(*call.query.shape[:-1], call.value.shape[-1])
    launches = backward.launches(call, output, output[..., 0], output[..., 0], output, gradients)
    return [launch.kernel.fn.__name__.removesuffix("_kernel") for launch in launches]


def test_it_stands_for_two(checked):
    call = checked(**BASE | WHOLE)
    assert launched(call) == ["fold", "backward_whole", "backward_prefix", "backward_reweighting"]
    assert launched(call, ("query", "key", "value")) == ["fold", "backward_whole"]
    assert launched(checked(**BASE, sink=True))[-1] == "backward_sink"


@pytest.mark.parametrize("options", [{"N": 65}, {"M": 65}, {"P": 65}])
def test_what_does_not_fit_takes_three(checked, options):
    assert "backward_whole" not in launched(checked(**BASE | WHOLE | options))


def test_what_needs_less_takes_three(checked):
    for without in ("query", "key", "value"):
        needed = [name for name in trainable(checked(**BASE | WHOLE)) if name != without]
        assert "backward_whole" not in launched(checked(**BASE | WHOLE), needed)


def test_a_few_programs_are_no_gain(checked, monkeypatch):
    monkeypatch.setattr(backward_whole, "MULTIPROCESSORS", 3)
    assert "backward_whole" not in launched(checked(**BASE | WHOLE))
    assert "backward_whole" in launched(checked(**BASE | WHOLE | {"B": 3}))
