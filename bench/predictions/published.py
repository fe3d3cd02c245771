"""Compares the cost model with published speeds of Triton's attention on an H100.

The forward kernel without a prefix is Triton's tutorial 06 (fused attention) as far as its loop goes: the same two
products, the same softmax, asynchronous copies of as many tiles. The tutorial tries a list of blocks and takes the
fastest, so the fastest predicted of the same list is compared. Its list leaves out 8 warps for tiles below 128x128 on
Hopper, and so does this one. No speed of its backward pass on an H100 was found.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from qtuning_fast.bench import shapes
from qtuning_fast.bench.predictions.compile_report import TARGETS
from qtuning_fast.bench.predictions.cost_model import H100, Prediction, predict
from qtuning_fast.bench.shapes import Shape
from qtuning_fast.kernels import forward
from qtuning_fast.kernels.blocks import Blocks, blocks_for, instead

# Rows of queries and of keys, warps, stages.
IN_2024 = ((64, 64, 4, 3), (64, 64, 4, 4), (128, 32, 4, 3), (128, 32, 4, 4), (128, 64, 4, 3), (128, 64, 4, 4))
IN_2025 = (*IN_2024, (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 4, 3))
HIDDEN = 2048  # heads times head size


@dataclass(frozen=True)
class Published:
    """One published speed, without causality, in 16-bit floating point."""

    source: str
    B: int
    heads: int
    N: int
    D: int
    teraflops: float  # a second, two products counted
    tried: tuple[tuple[int, int, int, int], ...]


def _of_16384_tokens(source: str, D: int, speeds: dict[int, float]) -> tuple[Published, ...]:
    return tuple(Published(source, 16384 // N, HIDDEN // D, N, D, speed, IN_2024) for N, speed in speeds.items())


FA3_PAPER = "Shah et al., FlashAttention-3, arXiv 2407.08608, figure 5"
TORCHBENCH = "github.com/pytorch/benchmark, commits ff65cb6 (head size 128) and e05b6fa (64), 2024"
TLX = "github.com/facebookexperimental/triton, pull request 206, 2025"
PUBLISHED = (
    *_of_16384_tokens(FA3_PAPER, 64, {8192: 401}),
    *_of_16384_tokens(FA3_PAPER, 128, {512: 323, 2048: 389, 8192: 392}),
    *_of_16384_tokens(TORCHBENCH, 64, {512: 290, 2048: 339, 8192: 350}),
    *_of_16384_tokens(TORCHBENCH, 128, {512: 329, 2048: 434, 8192: 471}),
    *(Published(TLX, 4, 32, N, 128, speed, IN_2025) for N, speed in {1024: 407, 4096: 460, 16384: 487}.items()),
)


@dataclass(frozen=True)
class Comparison:
    published: Published
    blocks: Blocks  # the fastest predicted
    prediction: Prediction

    @property
    def teraflops(self) -> float:
        one = self.published
        return 4 * one.B * one.heads * one.N**2 * one.D / self.prediction.microseconds / 1e6

    @property
    def error(self) -> float:
        """The predicted speed over the published one, less 1; -0.1: 10% below it."""
        return self.teraflops / self.published.teraflops - 1


def comparisons() -> Iterator[Comparison]:
    """Compares each speed; needs `AbsentDriver("sm_90")` or the GPU. Each kernel is compiled once."""
    compiled: dict[tuple[int, Blocks], object] = {}
    for one in PUBLISHED:
        shape = Shape("published", B=one.B, Hq=one.heads, Hkv=one.heads, N=one.N, D=one.D, P=0)
        call = shapes.inputs(shape, dtype=torch.float16, device="meta").call(shape)
        found = []
        for queries, keys, warps, stages in one.tried:
            incumbent = blocks_for("sm_90", 2, one.D, "forward")
            blocks = replace(incumbent, queries=queries, keys=keys, prefix=16, warps=warps, stages=stages)
            with instead(blocks):
                *_, launch = forward.launches(call, *forward.empty_outputs(call))
            if (one.D, blocks) not in compiled:
                compiled[one.D, blocks] = launch.compile()
            prediction = predict(launch, compiled[one.D, blocks], H100)
            if prediction.shared <= TARGETS["sm_90"].shared_memory:
                found.append(Comparison(one, blocks, prediction))
        yield min(found, key=lambda comparison: comparison.prediction.microseconds)
