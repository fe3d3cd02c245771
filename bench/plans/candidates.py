"""Block sizes worth trying, and the resources that the compiler gives them before any is run."""

import itertools
from dataclasses import replace
from typing import Any

import torch
import triton

from qtuning_fast.attention.arguments import trainable
from qtuning_fast.bench import shapes
from qtuning_fast.bench.predictions import compile_report
from qtuning_fast.bench.predictions.compile_report import MAY_NOT_SPILL, TARGETS, AbsentDriver
from qtuning_fast.bench.shapes import PrefixAttentionCall, Shape
from qtuning_fast.bench.timing import first_line
from qtuning_fast.kernels import backward, forward
from qtuning_fast.kernels.backward_whole import backward_whole_kernel
from qtuning_fast.kernels.blocks import Blocks, instead
from qtuning_fast.kernels.launch import Launch

# (rows of the program's own tile, rows of the tiles it walks over, warps), by bytes of an element and head size. A
# program's own tile is one of queries, but of keys in direction "keys", where two sums of it take up registers.
TILES = {
    (2, 32): [(64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)],
    (2, 64): [(64, 32, 4), (64, 64, 4), (64, 128, 8), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)],
    (2, 128): [(64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8), (128, 128, 8)],
    (2, 256): [(32, 32, 4), (32, 32, 8), (64, 16, 4), (64, 32, 4), (64, 32, 8), (64, 64, 8), (128, 32, 8)],
    (4, 32): [(32, 32, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8)],
    (4, 64): [(32, 32, 4), (32, 64, 4), (64, 32, 4), (64, 32, 8), (64, 64, 8)],
    (4, 128): [(16, 32, 4), (32, 16, 4), (32, 32, 4), (32, 32, 8), (64, 32, 8)],
    (4, 256): [(16, 16, 4), (16, 16, 8), (16, 32, 8), (32, 16, 8)],
}
TILES_OF_KEYS = TILES | {
    (2, 32): [(64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 32, 8), (128, 64, 8), (64, 16, 4)],
    (2, 64): [(64, 16, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 16, 8), (128, 32, 8), (128, 64, 8)],
    (2, 128): [(64, 16, 4), (64, 32, 4), (64, 32, 8), (64, 64, 8), (128, 16, 8), (128, 32, 8), (128, 64, 8)],
    (2, 256): [(16, 16, 4), (32, 16, 4), (32, 16, 8), (32, 32, 8), (64, 16, 8), (64, 32, 8)],
}
PREFIX = {(2, 256): (16, 32), (4, 64): (16, 32), (4, 128): (16, 32), (4, 256): (16,)}  # rows of a tile of the prefix
WALKED_PREFIX = (16, 32, 64)  # where no context is walked over
STAGES = {(2, 256): (1, 2), (4, 32): (2,), (4, 64): (2,), (4, 128): (1, 2), (4, 256): (1, 2)}
# Of the backward pass in one launch, which takes contexts and prefixes of so many rows at the most.
QUERIES_OF_WHOLE, KEYS_OF_WHOLE, PREFIX_OF_WHOLE = (32, 64, 128), 128, 64
SPILLED = 512  # bytes a thread; where nothing does without (float32, wide heads), a few may still be the fastest


def candidates(incumbent: Blocks) -> list[Blocks]:
    """The incumbent, then blocks that may be faster."""
    size = incumbent.element_size, incumbent.head_size
    found = [incumbent]
    if incumbent.direction == "whole":
        for queries, warps, stages in itertools.product(QUERIES_OF_WHOLE, (4, 8), (1, 2)):
            tiles = replace(incumbent, queries=queries, keys=KEYS_OF_WHOLE, prefix=PREFIX_OF_WHOLE)
            found.append(replace(tiles, warps=warps, stages=stages))
        return list(dict.fromkeys(found))
    of_keys, of_prefix = incumbent.direction == "keys", incumbent.direction in ("merge", "prefix-queries")
    for own, walked, warps in (TILES_OF_KEYS if of_keys else TILES)[size]:
        queries, keys = (walked, own) if of_keys else (own, walked)
        if of_prefix:
            keys = 0
        for prefix in WALKED_PREFIX if of_prefix else PREFIX.get(size, (32, 64)):
            for stages in (1, 3) if of_prefix else STAGES.get(size, (2, 3)):
                found.append(replace(incumbent, queries=queries, keys=keys, prefix=prefix, warps=warps, stages=stages))
    return list(dict.fromkeys(found))


def compile_for(target: str, dtype: torch.dtype, entry: Blocks, on_shapes: tuple[Shape, ...]) -> dict[str, Any]:
    """The largest of an entry's resources over the shapes, by name, or its `error`.

    It needs no GPU, so that many processes can compile at once. The process that measures finds the kernels in Triton's
    cache on disk.
    """
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(AbsentDriver(target))
    worst = {"registers": 0, "spilled": 0, "shared": 0}
    try:
        for shape in on_shapes:
            call = shapes.inputs(shape, dtype=dtype, device="meta").call(shape)
            with instead(entry):
                launch = _launch(call, entry)
            found = compile_report.resources(launch.compile(), TARGETS[target])
            worst = {name: max(value, found[name]) for name, value in worst.items()}
    except Exception as error:  # whatever a compiler may raise
        return {"error": first_line(error)}
    return worst


def _launch(call: PrefixAttentionCall, entry: Blocks) -> Launch:
    if entry.direction != "whole" or not entry.keys:
        return dict(compile_report.launches(call))["keys" if entry.direction == "whole" else entry.direction]
    outputs, gradients = forward.empty_outputs(call), backward.rooms(call, trainable(call))
    launches = backward.launches(call, *outputs, outputs[0], gradients)
    return next(each for each in launches if each.kernel is backward_whole_kernel)


def obstacle(entry: Blocks, resources: dict[str, Any], incumbent: dict[str, Any]) -> str:
    """Why an entry is not run, by its resources and the incumbent's; empty: it is run."""
    if resources.get("error"):
        return resources["error"]
    if resources["shared"] > TARGETS[entry.target].shared_memory:
        return f"{resources['shared']} bytes of shared memory"
    never = entry.element_size == 2 and (entry.target, entry.head_size) in MAY_NOT_SPILL
    allowed = max(incumbent.get("spilled", 0), 0 if never else SPILLED)
    return f"spills {resources['spilled']} bytes" if resources["spilled"] > allowed else ""
