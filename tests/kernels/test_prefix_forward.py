"""The prefix joins the context's output and log-sum-exp: tiles, and the order of samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtuning_fast.kernels import prefix_forward, prefix_part
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="shapes and precisions are those of the interpreter")
BASE = {"dtype": torch.float32, "B": 2, "Hkv": 1, "G": 2, "N": 9, "M": 7, "P": 5, "D": 16, "Dv": 16}
DECODE = {"B": 5, "N": 1, "G": 4, "M": 3}
BANK = {"B": 6, "T": 7, "lengths": True, "gate_shape": "task, head"}


@pytest.fixture
def make(checked):
    return lambda **options: checked(**BASE | options)


def test_a_sample_does_not_see_the_order_of_the_others(make, context_alone):
    call = make(**BANK | DECODE | {"B": 12})
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    samples = {name: getattr(call, name)[order] for name in ("query", "key", "value", "prefix_index")}
    whole, shuffled = context_alone(call), context_alone(replace(call, **samples))
    prefix_part.merge(call, *whole, torch.zeros_like(whole[1]))
    prefix_part.merge(replace(call, **samples), *shuffled, torch.zeros_like(shuffled[1]))
    for x, y in zip(whole, shuffled):
        torch.testing.assert_close(x[order], y)


@pytest.mark.parametrize(("N", "block", "programs"), [(1, 16, 1), (132 * 16, 16, 132), (132 * 64, 64, 132)])
def test_few_rows_have_small_tiles(make, context_alone, N, block, programs):
    call = make(B=1, G=1, N=N, M=0)
    launch = prefix_forward.launch(call, *context_alone(call), torch.empty(0))
    assert launch.arguments["variant"].BLOCK_N.value == block and launch.programs == programs
