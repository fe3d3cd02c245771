"""A short benchmark by pytest-benchmark: ours, plain PyTorch and the lower bound on a few shapes.

    make bench                # kept in .benchmarks
    make bench COMPARE=1      # and set beside the last one

A peer is checked before it is timed; if it is wrong, its test fails. The largest error and the counted work stand
beside the time. A step is forward and backward.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from qtuning_fast.bench import shapes
from qtuning_fast.bench.accuracy import Errors, Reference, check, prepare, verdict
from qtuning_fast.bench.measure import default_device, default_dtype
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.rows.roofline import backward_work, forward_work
from qtuning_fast.bench.shapes import Shape

DEVICE = default_device()
DTYPE = default_dtype(DEVICE)
ON_GPU = ("tiny", "bert-base", "bert-base-mixed", "llama-8b", "decode-64")
ON_CPU = ("tiny", "minilm-cpu", "bert-base-512-cpu", "bert-base-mixed-cpu", "decode-cpu")
SHAPES = [shapes.SHAPES[name] for name in (ON_GPU if DEVICE == "cuda" else ON_CPU)]  # tiny: what any call costs
OURS = ("fused", "composed") if DEVICE == "cuda" else ("native", "composed")

side_by_side = pytest.mark.parametrize("peer", [*OURS, "eager", "sdpa"])
briefly = pytest.mark.benchmark(min_rounds=5, max_time=0.7, warmup=True, warmup_iterations=2)


@briefly
@side_by_side
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_forward(benchmark: Any, shape: Shape, peer: str) -> None:
    reference = reference_of(shape)
    describe(benchmark, "forward", reference, checked(peer, reference, training=False))
    benchmark(to_the_end(prepare(PEERS[peer], shape, reference.inputs, training=False).forward))


@briefly
@side_by_side
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.trained], ids=lambda shape: shape.name)
def test_step(benchmark: Any, shape: Shape, peer: str) -> None:
    reference = reference_of(shape)
    describe(benchmark, "step", reference, checked(peer, reference, training=True))
    prepared = prepare(PEERS[peer], shape, reference.inputs, training=True)
    benchmark(to_the_end(partial(prepared.step, reference.inputs.d_output)))


@cache
def reference_of(shape: Shape) -> Reference:
    return Reference(shape, shapes.inputs(shape, dtype=DTYPE, device=DEVICE))


def checked(peer: str, reference: Reference, *, training: bool) -> Errors:
    """A peer's errors, after a check that none is larger than rounding explains."""
    errors: Errors = {}
    check(PEERS[peer], reference, errors, training=training)
    assert not verdict(errors, DTYPE), f"{peer}: {verdict(errors, DTYPE)}"
    return errors


def describe(benchmark: Any, name: str, reference: Reference, errors: Errors) -> None:
    shape = reference.shape
    work = forward_work(shape, DTYPE.itemsize)
    if name == "step":
        work += backward_work(shape, DTYPE.itemsize)
    benchmark.group = f"{shape.name}, {name}: {shape}"
    benchmark.extra_info |= {"largest_error": max(errors.values()), "flops": work.flops, "bytes": work.bytes}


def to_the_end(work: Callable[[], object]) -> Callable[[], object]:
    """Work that ends when the GPU has finished it, not when it is launched."""

    def run() -> None:
        work()
        torch.cuda.synchronize()

    return run if DEVICE == "cuda" else work
