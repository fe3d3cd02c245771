"""The backward pass in one launch, where the context fits into a tile: as exact as the three it stands for."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast import prefix_attention
from qtuning_fast.attention.arguments import trainable
from qtuning_fast.attention.common import GATES
from qtuning_fast.kernels import backward, backward_whole
from qtuning_fast.kernels.blocks import Blocks, instead
from qtuning_fast.kernels.target import INTERPRETED

thorough = pytest.mark.thorough
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


def launched(arguments, call_of):
    call = call_of(arguments)
    gradients = backward.rooms(call, trainable(call))
    output = torch.empty(*call.query.shape[:-1], call.value.shape[-1])
    launches = backward.launches(call, output, output[..., 0], output[..., 0], output, gradients)
    return [launch.kernel.fn.__name__.removesuffix("_kernel") for launch in launches]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"mask": "padding bool"},
        {"mask": "full float", "is_causal": True, "bias": True},
        {"B": 4, "T": 3, "lengths": True, "gate_shape": "task, head", "G": 1},
        {"N": 63, "M": 64, "P": 64, "G": 1},
        {"N": 33, "M": 1, "P": 1, "n_shared": 1},
        {"N": 5, "M": 17, "P": 4, "D": 24, "Dv": 40},
        {"G": 3, "Hkv": 2, "P": 0, "n_shared": 0},
        {"gate": None},
        {"M": 0},
        {"scale": -0.7},
        {"window": (4, 3), "sink": True},
        {"softcap": 2.0},
        *(pytest.param({"gate": gate}, marks=thorough) for gate in GATES if gate != "tanh"),
        *(pytest.param({"mask": mask}, marks=thorough) for mask in ("padding float", "full bool")),
    ],
    ids=lambda options: "-".join(f"{name} {x}" for name, x in options.items()),
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(dtype, marks=thorough) for dtype in (torch.float16, torch.bfloat16))]
)
def test_it_is_as_exact_as_three_launches(assert_accurate, make_call, call_of, request, options, dtype):
    if dtype == torch.bfloat16:
        request.getfixturevalue("bfloat16_as_on_nvidia")
    options = BASE | WHOLE | options | {"dtype": dtype}
    assert "backward_whole" in launched(make_call(**options), call_of)
    assert_accurate("fused", **options)


def test_the_same_bits_twice(make_call, leaves):
    arguments = make_call(**BASE | WHOLE)
    inputs = list(leaves(arguments).values())

    def gradients():
        return torch.autograd.grad(prefix_attention(**arguments, backend="fused").sum(), inputs)

    assert all(torch.equal(x, y) for x, y in zip(gradients(), gradients(), strict=True))
