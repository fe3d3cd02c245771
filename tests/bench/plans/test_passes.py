"""One direction of the kernels by itself computes the same with any blocks."""

from dataclasses import replace

import pytest
import torch

from qtuning_fast.bench.plans.passes import Pass, difference
from qtuning_fast.bench.shapes import Shape, inputs
from qtuning_fast.kernels.blocks import Blocks

SMALL = Shape("small", B=1, Hq=2, Hkv=1, N=20, D=16, P=12, is_causal=True)
BLOCKS = Blocks("interpreter", 4, 16, "forward", queries=32, keys=32, prefix=16, warps=4, stages=2)


@pytest.mark.parametrize("direction", ["forward", "merge", "queries", "keys", "prefix-queries"])
def test_results_do_not_depend_on_blocks(direction):
    entry = replace(BLOCKS, direction=direction)
    one = Pass(SMALL, inputs(SMALL, dtype=torch.float32, device="cpu"), direction)
    ratio, name = difference(one.compute(replace(entry, queries=16)), one.compute(entry))
    assert ratio < 1e-5, name


def test_a_difference_is_relative_and_nan_is_the_largest():
    x = torch.tensor([3.0, 4.0])
    assert difference({"x": x + 0.5}, {"x": x}) == (pytest.approx(0.5 * 2**0.5 / 5), "x")
    assert difference({"x": x, "y": x * torch.nan}, {"x": x, "y": x}) == (torch.inf, "y")
