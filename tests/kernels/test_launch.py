"""With which blocks a kernel is launched, and what it is told when it is compiled."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.kernels import launch
from qtuning_fast.kernels.blocks import Blocks, instead
from qtuning_fast.kernels.launch import Launch
from qtuning_fast.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the blocks are the interpreter's")

BASE = {"dtype": torch.float32, "B": 2, "Hkv": 2, "G": 2, "N": 5, "M": 7, "P": 3, "D": 16, "Dv": 24}
FORWARD = Blocks("interpreter", 4, 64, "forward", queries=64, keys=32, prefix=64, warps=8, stages=3)
MERGE = Blocks("interpreter", 4, 64, "merge", queries=64, keys=0, prefix=16, warps=8, stages=1)


class Kernel:
    """Stands for one of Triton's: notes its grid and its arguments."""

    def __init__(self):
        self.grids, self.given = [], {}

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda **given: self.given.update(given) or "compiled"

    def warmup(self, grid, **given):
        return self[grid](**given)


def test_a_launch_hands_over_arguments_and_options():
    kernel = Kernel()
    assert Launch(kernel, 3, {"x": 1}, {"num_warps": 4}).run() == "compiled"
    assert kernel.grids == [(3,)] and kernel.given == {"x": 1, "num_warps": 4}


def test_without_programs_nothing_runs_but_all_is_compiled():
    kernel = Kernel()
    nothing = Launch(kernel, 0, {}, {})
    assert nothing.run() is None and not kernel.grids
    assert nothing.compile() == "compiled" and kernel.grids == [(1,)]


@pytest.mark.parametrize(
    ("N", "P", "expected"), [(5, 3, (16, 32, 16)), (33, 17, (64, 32, 32)), (999, 999, (64, 32, 64))]
)
def test_tiles_are_no_larger_than_a_call_needs(checked, N, P, expected):
    with instead(FORWARD):
        variant, options = launch.variant_for(checked(**BASE | {"N": N, "P": P}), "forward")
    assert (variant.BLOCK_N, variant.BLOCK_M, variant.BLOCK_P) == expected
    assert options == {"num_warps": 8, "num_stages": 3}


@pytest.mark.parametrize(
    ("options", "has_mask", "exact"),
    [
        ({}, False, True),
        ({"is_causal": True, "window": (3, 0)}, False, True),
        ({"dtype": torch.float16}, False, False),
        ({"dtype": torch.float16, "mask": "padding bool"}, True, False),
        ({"dtype": torch.float16, "mask": "full float"}, True, True),
        ({"dtype": torch.float16, "mask": "full bool + padding float"}, True, True),
        ({"dtype": torch.float16, "bias": True}, False, True),
    ],
    ids=str,
)
def test_what_is_known_when_a_kernel_is_compiled(checked, options, has_mask, exact):
    variant, _ = launch.variant_for(checked(**BASE | options), "forward")
    assert (variant.HAS_MASK, variant.EXACT, variant.PRECISION) == (has_mask, exact, "ieee")
    assert [x.value for x in variant.marked()] == list(variant)


@pytest.mark.parametrize(("target", "precision"), [("sm_90", "tf32"), ("gfx942", "tf32"), ("gfx1100", "ieee")])
def test_products_of_float32_are_as_pytorchs_where_the_hardware_can(monkeypatch, target, precision):
    monkeypatch.setattr(launch, "current_target", lambda: target)
    assert launch._precision(torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert launch._precision(torch.float32) == precision and launch._precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_program_has_one_tile_of_queries_of_one_head(checked):
    with instead(FORWARD):
        found = launch.over_queries(Kernel(), checked(**BASE | {"N": 130}), "forward", {"x": 1})
    assert found.programs == 2 * 4 * 3 and found.arguments["x"] == 1
    assert found.arguments["variant"].BLOCK_N.value == 64


@pytest.mark.parametrize(
    ("N", "queries", "prefix", "warps", "programs"),
    [
        (1, 16, 64, 4, 2),  # few rows: lower tiles, more of the prefix, fewer warps
        (132 * 64, 64, 16, 8, 1056),
    ],
)
def test_stacked_rows_fill_the_gpu_before_they_fill_tiles(checked, N, queries, prefix, warps, programs):
    with instead(MERGE):
        found = launch.over_stacked_rows(Kernel(), checked(**BASE | {"N": N, "M": 1, "P": 200}), "merge", {})
    variant = found.arguments["variant"]
    assert (variant.BLOCK_N.value, variant.BLOCK_P.value, variant.BLOCK_M.value) == (queries, prefix, 0)
    assert found.options["num_warps"] == warps and found.programs == programs
    assert not variant.HAS_MASK.value
