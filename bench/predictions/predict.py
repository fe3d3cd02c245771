"""Predicts the times of the kernels on GPUs that are absent, and prints them beside the roofline.

    python -m qtuning_fast.bench.predictions.predict                         a training step of the headline shapes
    python -m qtuning_fast.bench.predictions.predict --shape llama-8b --device h200 --save
    python -m qtuning_fast.bench.predictions.predict --published             beside published speeds
    python -m qtuning_fast.bench.predictions.predict --rank --head-size 64 --direction keys --save

--rank compiles the candidates of bench/plans/candidates.py, by several processes, and orders them by the geometric mean
of their predicted times over the shapes that `tune` measures; with "keys" goes the launch that adds up after it. --save
writes bench/results/predicted/DEVICE.json (steps) or DEVICE-candidates.json; a step is printed beside the one that was
saved before. Needs no GPU.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
import triton

from qtuning_fast.attention.arguments import trainable
from qtuning_fast.bench import shapes
from qtuning_fast.bench.plans.candidates import candidates
from qtuning_fast.bench.plans.tune import SHAPES
from qtuning_fast.bench.predictions import published
from qtuning_fast.bench.predictions.compile_report import TARGETS, AbsentDriver
from qtuning_fast.bench.predictions.cost_model import DEVICES, Cache, Device, Prediction, predict
from qtuning_fast.bench.results import ROOT
from qtuning_fast.bench.rows.roofline import SPECIAL_A_CLOCK, Ceilings, backward_work, forward_work
from qtuning_fast.bench.shapes import BERT_BASE, BERT_BASE_512, LLAMA_8B, MINILM, VIT_B16, Shape
from qtuning_fast.bench.timing import first_line
from qtuning_fast.kernels import backward, forward, prefix_forward
from qtuning_fast.kernels.blocks import DIRECTIONS, Blocks, blocks_for, instead
from qtuning_fast.kernels.fold import folded
from qtuning_fast.kernels.launch import Launch
from qtuning_fast.kernels.target import INTERPRETED

HEADLINES = (BERT_BASE, VIT_B16, BERT_BASE_512, LLAMA_8B, MINILM)
FOLDER = ROOT / "bench/results/predicted"
TARGET = "sm_90"
SHOWN = 5  # candidates of each ranking
AFTER = {"keys": "prefix", "whole": "prefix"}  # how much this launch has to add up is up to the blocks of that one


def launches(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, Launch]]:
    """The launches of a step by name, in their order. With one query a sample, where the context is not ours, those
    that add the prefix."""
    x = shapes.inputs(shape, dtype=dtype, device="meta")
    call = x.call(shape)
    outputs = forward.empty_outputs(call)
    if shape.N == 1:
        as_seen, found = folded(call)
        found.append(prefix_forward.launch(as_seen, *outputs))
    else:
        found = [*forward.launches(call, *outputs)]
    if shape.trained:
        gradients = backward.rooms(call, trainable(call))
        found += backward.launches(call, *outputs, x.d_output, gradients)
    return [(name_of(launch), launch) for launch in found if launch.programs]


def name_of(launch: Launch) -> str:
    """A kernel's name as the directions of the table of blocks have it: `backward_keys_kernel` is "keys"."""
    name = launch.kernel.fn.__name__
    return name.removeprefix("backward_").removesuffix("_kernel").replace("_", "-")


def step(shape: Shape, device: Device, blocks: Iterable[Blocks] = ()) -> list[tuple[str, Prediction]]:
    """The launches of a step, one after the other from a cold cache, with these blocks instead of the table's."""
    cache = Cache(device.cache_that_holds)
    with ExitStack() as stack:
        for entry in blocks:
            stack.enter_context(instead(entry))
        return [(name, predict(launch, launch.compile(), device, cache)) for name, launch in launches(shape)]


def roofline(shape: Shape, device: Device) -> dict[str, tuple[float, str]]:
    """The least microseconds of each pass, and what bounds them."""
    special = SPECIAL_A_CLOCK * device.multiprocessors * device.clock
    ceilings = Ceilings(device.products, device.memory, device.memory, special)
    work = {"forward": forward_work(shape)} | ({"backward": backward_work(shape)} if shape.trained else {})
    floors = {name: one.least_ms(ceilings) for name, one in work.items()}
    return {name: (milliseconds * 1e3, limit) for name, (milliseconds, limit) in floors.items()}


def saved(name: str) -> list[dict[str, Any]]:
    """The rows of a file: of "h100" the steps, of "h100-candidates" the candidates, the best first."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def save(name: str, rows: Sequence[Mapping[str, Any]], by: tuple[str, ...]) -> None:
    """Writes rows into a file in place of those that have the same values `by` these keys."""
    new = {tuple(row[key] for key in by) for row in rows}
    rows = [*(row for row in saved(name) if tuple(row[key] for key in by) not in new), *rows]
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = json.dumps({"triton": triton.__version__, "torch": torch.__version__})
    lines = ",\n".join(json.dumps(row) for row in rows)  # a row a line, so that a change shows which
    path.write_text(f'{{"versions": {versions}, "rows": [\n{lines}\n]}}\n')


def _step(job: tuple[Shape, str]) -> list[dict[str, Any]]:
    shape, device = job
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(AbsentDriver(TARGET))
    found = step(shape, DEVICES[device])
    return [{"shape": shape.name, "kernel": kernel, **asdict(prediction)} for kernel, prediction in found]


def print_steps(chosen: Sequence[Shape], device: Device, rows: Sequence[Mapping[str, Any]]) -> None:
    before = {(row["shape"], row["kernel"]): row["microseconds"] for row in saved(device.name)}
    print(f"\n{device.name}: microseconds" + " " * 34 + "before   bound     busiest      regs shared res programs")
    for shape in chosen:
        mine = [row for row in rows if row["shape"] == shape.name]
        floors = roofline(shape, device)
        for row in mine:
            busiest = max(row["busy"], key=row["busy"].__getitem__)
            was = before.get((shape.name, row["kernel"]))
            print(
                f"{shape.name:15s} {row['kernel']:9s} {row['microseconds']:8.1f} {'':17s} {was or 0:9.1f}   "
                f"{row['bound']:9s} {busiest:>7s} {row['busy'][busiest]:4.0%} {row['registers']:5d} "
                f"{row['shared'] // 1024:3d}KB {row['resident']:3d} {row['programs']:8d}"
            )
        lowest = sum(microseconds for microseconds, _ in floors.values())
        limits = ", ".join(limit for _, limit in floors.values())
        total = sum(row["microseconds"] for row in mine)
        was = sum(before.get((shape.name, row["kernel"]), 0) for row in mine)
        print(f"{shape.name:15s} {'step':9s} {total:8.1f}   roofline {lowest:6.1f} {was:9.1f}   {limits}")


def rank(head_size: int, direction: str, device: Device, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """The candidates of one direction, the fastest first, without those that cannot run."""
    incumbent = blocks_for(TARGET, 2, head_size, direction)
    entries = candidates(incumbent)
    found = pool.map(_candidate, [(entry, device.name) for entry in entries])
    rows = [{**asdict(entry), "incumbent": entry == incumbent, **row} for entry, row in zip(entries, found)]
    return sorted((row for row in rows if not row["error"]), key=lambda row: row["microseconds"])


def _candidate(job: tuple[Blocks, str]) -> dict[str, Any]:
    entry, device = job
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(AbsentDriver(TARGET))
    times: dict[str, float] = {}
    prediction = None
    try:
        for shape in SHAPES[entry.head_size]:
            with instead(entry):
                found = dict(launches(shape))
            launch = found[entry.direction]
            prediction = predict(launch, launch.compile(), DEVICES[device])
            if prediction.shared > TARGETS[TARGET].shared_memory or prediction.spilled:
                return {"error": f"{prediction.shared} bytes of shared memory, {prediction.spilled} spilled"}
            times[shape.name] = prediction.microseconds
            if after := found.get(AFTER.get(entry.direction, "")):
                times[shape.name] += predict(after, after.compile(), DEVICES[device]).microseconds
    except Exception as error:  # whatever a compiler may raise
        return {"error": first_line(error)}
    return {
        "error": "",
        "microseconds": statistics.geometric_mean(times.values()),
        "shapes": times,
        "bound": prediction.bound if prediction else "",
        "resident": prediction.resident if prediction else 0,
        "registers": prediction.registers if prediction else 0,
    }


def print_ranks(rows: Sequence[Mapping[str, Any]]) -> None:
    for place, row in enumerate(rows):
        if place < SHOWN or row["incumbent"]:
            name = f"{row['queries']}x{row['keys']}x{row['prefix']} w{row['warps']} s{row['stages']}"
            times = " ".join(f"{shape} {time:.1f}" for shape, time in row["shapes"].items())
            mark = "<- ships" if row["incumbent"] else ""
            print(
                f"D{row['head_size']} {row['direction']:8s} {place + 1:3d}. {name:20s} {row['microseconds']:8.1f} us "
                f"{row['bound']:8s} {row['resident']} resident, {row['registers']} registers; {times} {mark}"
            )


def print_published() -> None:
    for one in published.comparisons():
        name = f"{one.blocks.queries}x{one.blocks.keys} w{one.blocks.warps} s{one.blocks.stages}"
        print(
            f"D{one.published.D:<4d} N{one.published.N:<6d} published {one.published.teraflops:4.0f} TFLOP/s predicted "
            f"{one.teraflops:5.0f} ({one.error:+.0%}) {one.prediction.bound:8s} {name:16s} {one.published.source}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {shape.name: shape for shape in (*HEADLINES, *shapes.GPU)}
    parser.add_argument("--shape", nargs="+", choices=names, default=[shape.name for shape in HEADLINES])
    parser.add_argument("--device", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--rank", action="store_true")
    parser.add_argument("--head-size", nargs="+", type=int, choices=SHAPES, default=[32, 64, 128])
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=["forward", "queries", "keys"])
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled; unset it")

    if options.published:
        triton.runtime.driver.set_active(AbsentDriver(TARGET))
        print_published()
        return 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for device in (DEVICES[name] for name in options.device):
            rows: list[dict[str, Any]] = []
            if options.rank:
                for head_size in options.head_size:
                    for direction in options.direction:
                        ranked = rank(head_size, direction, device, pool)
                        print_ranks(ranked)
                        rows += ranked
            else:
                chosen = [names[name] for name in options.shape]
                rows = [row for found in pool.map(_step, [(s, device.name) for s in chosen]) for row in found]
                print_steps(chosen, device, rows)
            if options.save and options.rank:
                save(f"{device.name}-candidates", rows, by=("head_size", "direction"))
            elif options.save:
                save(device.name, rows, by=("shape",))
    return 0


if __name__ == "__main__":
    sys.exit(main())
