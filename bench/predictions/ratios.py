"""The ratios of the targets by prediction, row by row, before there is a GPU.

    python -m qtuning_fast.bench.predictions.ratios --save

Ours is what `predict` says of a step. Peers are put together of parts, for none of them compiles without a GPU:

    attention   a step of our own kernels without gate and prefix, over P + M keys: Triton's speed for plain attention
    concat      the prefix reweighted, expanded and put in front of keys and values, and the way back of its gradients:
                bytes over the memory's bandwidth, and launches
    gate        tanh and its derivative on every score, context included, as a score_mod is evaluated: instructions over
                what a multiprocessor issues

    sdpa = attention + concat        flex-frozen-gate = attention + concat + gate, its tanh by some 20 instructions

So a peer that computes faster than Triton, as cuDNN does for long contexts, is better than its row.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

import triton

from qtuning_fast.bench.predictions import predict
from qtuning_fast.bench.predictions.compile_report import AbsentDriver
from qtuning_fast.bench.predictions.cost_model import DEVICES, Device
from qtuning_fast.bench.shapes import Shape

LAUNCHES = {"sdpa": 10, "flex-frozen-gate": 5}  # of concat: one an operator; fused by the compiler, fewer
PASSES = 3  # over the scores: forward, and two backward
TANH, SLOPE = 20, 4  # instructions a score: an exponential, a quotient, a branch of small arguments; 1 - tanh²
ISSUED = 128  # lanes a clock and multiprocessor


def peers(shape: Shape, device: Device) -> dict[str, dict[str, float]]:
    """Microseconds of the parts of each peer's step."""
    alone = replace(shape, name=f"{shape.name}-alone", P=0, context=shape.M + shape.P)
    attention = sum(one.microseconds for _, one in predict.step(alone, device))
    rows = shape.B * shape.Hkv * shape.D * 2  # bytes of a row of all samples and heads, in bfloat16
    moved = 2 * rows * (shape.M + (shape.M + shape.P)) + 2 * rows * shape.P  # forward; gradients of the prefix, read
    scores = shape.B * shape.Hq * shape.N * (shape.M + shape.P) * (0.5 if shape.is_causal else 1.0)
    gate = scores * (PASSES * TANH + (PASSES - 1) * SLOPE) / (ISSUED * device.multiprocessors * device.clock) * 1e6
    found = {}
    for name, launches in LAUNCHES.items():
        concat = moved / device.memory * 1e6 + launches * device.launch * 1e6
        found[name] = {"attention": attention, "concat": concat, "gate": gate if name.startswith("flex") else 0.0}
    return found


def rows(device: Device) -> list[dict[str, Any]]:
    """For each headline shape our step, the peers' steps, and the ratios of the targets."""
    found = []
    for shape in predict.HEADLINES:
        ours = sum(one.microseconds for _, one in predict.step(shape, device))
        parts = peers(shape, device)
        steps = {name: sum(each.values()) for name, each in parts.items()}
        ratios = {"flex-frozen-gate / fused": steps["flex-frozen-gate"] / ours, "fused / sdpa": ours / steps["sdpa"]}
        found.append({"shape": shape.name, "fused": ours, "peers": steps, "parts": parts, "ratios": ratios})
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, default="h100")
    parser.add_argument("--save", action="store_true", help="write bench/results/predicted/DEVICE-ratios.json")
    options = parser.parse_args(arguments)
    triton.runtime.driver.set_active(AbsentDriver(predict.TARGET))
    found = rows(DEVICES[options.device])
    print(f"{options.device}, µs a step   fused    sdpa    flex, gate frozen   flex / fused   fused / sdpa")
    for row in found:
        steps, ratios = row["peers"], list(row["ratios"].values())
        print(
            f"{row['shape']:18s} {row['fused']:9.0f} {steps['sdpa']:7.0f} {steps['flex-frozen-gate']:20.0f}"
            f" {ratios[0]:14.2f} {ratios[1]:14.2f}"
        )
    if options.save:
        predict.save(f"{options.device}-ratios", found, by=("shape",))
    return 0


if __name__ == "__main__":
    sys.exit(main())
