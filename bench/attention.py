"""The operator beside its peers: forward, and forward with backward, of one layer in training.

    python -m qtuning_fast.bench.attention                          all shapes, all peers
    python -m qtuning_fast.bench.attention --shape bert-base llama-8b --quick --out FILE

Query, key, value, the prefix, U, V, alpha and tau are all trained; what belongs to the prefix is float32, the rest
bfloat16 (float32 on a CPU). Before a peer is timed
its output and its gradients are compared with a float64 reference on part of the batch. Peers without a gate compute
less: they are compared with what they compute, and show what a gate costs.

Results go to a JSON file after each shape, so that a run that is cut off counts as far as it got.
"""

import argparse
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtuning_fast.bench import shapes
from qtuning_fast.bench.floors import Ceilings, backward_work, forward_work, measured_ceilings
from qtuning_fast.bench.memory import step_peak
from qtuning_fast.bench.peers import PEERS, Peer, Prepared, leaves, operator
from qtuning_fast.bench.shapes import SHAPES, Inputs, Shape
from qtuning_fast.bench.timing import Call, Measurement, Timing, compare, first_line, sets_for

ON_GPU = ("bert-base", "llama-8b-4096", "vit-b16", "minilm", "bert-base-512", "llama-8b", "long")
ON_CPU = ("cpu-128", "cpu-512", "cpu-2048", "cpu-4096")
PEERS_ON_CPU = ("composed", "composed-ungated", "eager", "sdpa-ungated", "sdpa-ungated-no-concat", "flex")
OURS = ("fused", "composed")  # the first that is measured is what ratios are to
ROUNDS, QUICK_ROUNDS = 40, 8
LARGEST_REFERENCE = 1 << 28  # scores in float64: 2 GiB, of which the reference holds several
SUSPICIOUS = 0.05  # a relative error that no rounding to 16 bits explains


@dataclass
class Row:
    """One peer on one shape. Errors of results are ‖x − reference‖ / ‖reference‖; NaN counts as infinite."""

    peer: str
    output_error: float | None = None
    gradient_errors: dict[str, float] = field(default_factory=dict)
    forward: Measurement = field(default_factory=Measurement)
    step: Measurement = field(default_factory=Measurement)  # forward and backward
    step_peak: int | None = None  # bytes that it takes at the most, beyond its inputs; see bench.memory
    error: str = ""


def measure_shape(name: str, peers: Sequence[str], device: str, rounds: int, ceilings: Ceilings) -> dict[str, Any]:
    """Everything about one shape, as JSON has it."""
    shape, gpu = SHAPES[name], torch.device(device)
    dtype = torch.bfloat16 if gpu.type == "cuda" else torch.float32
    count = sets_for(shapes.inputs(shape, dtype=dtype, device="meta").nbytes, gpu)
    sets = shapes.input_sets(shape, count, dtype=dtype, device=device)
    started = time.perf_counter()

    rows = {peer: Row(peer) for peer in peers}
    reference = Reference(shape, sets[0])
    setups: dict[str, Callable[[], list[Call]]] = {}
    for peer, row in rows.items():
        try:
            check(PEERS[peer], reference, row)
        except Exception as error:  # what a peer cannot do is its row
            row.error = first_line(error)
        if row.output_error is None:
            continue
        prepare = _prepared(PEERS[peer], shape, sets)
        setups[f"{peer} forward"] = _forwards(prepare)
        if row.gradient_errors:
            setups[f"{peer} step"] = _steps(prepare)
    del reference
    if gpu.type == "cuda":
        torch.cuda.empty_cache()  # what the checks took, for the graphs
    times = compare(setups, device=gpu, rounds=rounds)
    for peer, row in rows.items():
        row.forward = times.get(f"{peer} forward", row.forward)
        row.step = times.get(f"{peer} step", row.step)
        if row.step.best is not None:
            row.step_peak = _step_peak(shape, peer, device)
        row.error = row.error or row.forward.error or row.step.error or row.forward.graph_error or row.step.graph_error

    forward, backward = forward_work(shape, dtype.itemsize), backward_work(shape, dtype.itemsize)
    return {
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "sets_of_inputs": len(sets),
        "work": {"forward": asdict(forward), "backward": asdict(backward)},
        "floor_ms": {"forward": forward.floor(ceilings), "step": (forward + backward).floor(ceilings)},
        "rows": [asdict(row) for row in rows.values()],
        "seconds": round(time.perf_counter() - started, 1),
    }


def _step_peak(shape: Shape, peer: str, device: str) -> int | None:
    return step_peak(shape, peer, device) if device == "cuda" else in_a_process(step_peak, shape, peer, device)


def _prepared(peer: Peer, shape: Shape, sets: Sequence[Inputs]) -> Callable[[], list[tuple[Prepared, Tensor]]]:
    """The peer with each set of inputs, prepared once for forward and step."""
    return cache(lambda: [(peer.prepare(shape, x.tracked()), x.d_output) for x in sets])


def _forwards(prepare: Callable[[], list[tuple[Prepared, Tensor]]]) -> Callable[[], list[Call]]:
    return lambda: [prepared.forward for prepared, _ in prepare()]


def _steps(prepare: Callable[[], list[tuple[Prepared, Tensor]]]) -> Callable[[], list[Call]]:
    return lambda: [partial(prepared.step, d_output) for prepared, d_output in prepare()]


class Reference:
    """Output and gradients in float64, by definition.

    On part of the batch: the gradient that comes in is zero for all other samples, so that the prefix's gradients, sums
    over the batch, are those of that part, while the peers run the shape as it is.
    """

    def __init__(self, shape: Shape, x: Inputs) -> None:
        scores = shape.Hq * shape.N * (shape.P + shape.N)
        count = min(shape.B, max(1, LARGEST_REFERENCE // scores))
        self.shape = shape
        # From both ends of the batch: indices that overflow, or a last block forgotten, show at the end.
        self.samples = (torch.arange(count, device=x.query.device) - count // 2) % shape.B
        chosen = torch.zeros(shape.B, 1, 1, 1, device=x.query.device, dtype=x.query.dtype)
        chosen[self.samples] = 1
        self.inputs = Inputs(**x.trained(), d_output=x.d_output * chosen)
        self._known: dict[tuple[bool, bool], tuple[Tensor, dict[str, Tensor]]] = {}

    def of(self, gated: bool, reweighted: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The output and the gradients by name, of the chosen samples."""
        if (gated, reweighted) not in self._known:
            self._known[gated, reweighted] = self._compute(gated, reweighted)
        return self._known[gated, reweighted]

    def _compute(self, gated: bool, reweighted: bool) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.inputs.of_samples(self.samples).detached(torch.float64).tracked()
        trained = leaves(x, gated=gated, reweighted=reweighted)
        output = operator("reference", x, self.shape, gated=gated, reweighted=reweighted)
        gradients = torch.autograd.grad(output, list(trained.values()), x.d_output)
        return output.detach(), dict(zip(trained, gradients))

    def error(self, name: str, x: Tensor, reference: Tensor) -> float:
        """Of all that was returned: what belongs to samples that were not chosen must be 0."""
        x = x.detach().double()
        if name in ("query", "key", "value"):
            whole = torch.zeros_like(x)
            whole[self.samples] = reference
            reference = whole
        ratio = ((x - reference).norm() / reference.norm()).item()
        return math.inf if math.isnan(ratio) else ratio


def check(peer: Peer, reference: Reference, row: Row) -> None:
    """Writes a peer's errors into its row; raises what the peer raises."""
    expected, gradients = reference.of(peer.gated, peer.reweighted)
    x = reference.inputs.tracked()
    prepared = peer.prepare(reference.shape, x)
    output = prepared.forward()
    row.output_error = reference.error("output", output[reference.samples], expected)
    found = torch.autograd.grad(output, list(prepared.leaves.values()), x.d_output)
    for name, gradient in prepared.as_trained(dict(zip(prepared.leaves, found))).items():
        row.gradient_errors[name] = reference.error(name, gradient, gradients[name])


def table(result: dict[str, Any]) -> str:
    """One shape as text, at most 120 columns wide."""
    shape = Shape(**result["shape"])
    floors = [f"{pass_name} {ms:.4f} ms ({limit})" for pass_name, (ms, limit) in result["floor_ms"].items()]
    lines = [
        f"{shape}, {result['dtype']}, {result['sets_of_inputs']} sets of inputs",
        f"  floor: {', '.join(floors)}",
        f"  {'peer':<23}{'forward':>9}{'±iqr':>8}{'step':>9}{'±iqr':>8}{'ratio':>7}{'eager f':>9}{'eager s':>9}"
        f"{'peak MB':>9}{'err out':>9}{'err grad':>9} worst",
    ]
    rows = {row["peer"]: row for row in result["rows"]}
    ours = next((_median(rows[name], "step") for name in OURS if name in rows), None)
    for name, row in rows.items():
        forward, step = (_best(row[part]) for part in ("forward", "step"))
        ratio = step.median / ours if step and ours else None
        eager = [row[part]["eager"]["median"] if row[part]["eager"] else None for part in ("forward", "step")]
        worst = max(row["gradient_errors"], key=row["gradient_errors"].__getitem__, default="")
        errors = [row["output_error"], row["gradient_errors"].get(worst)]
        note = "WRONG? " if any(e is not None and e > SUSPICIOUS for e in errors) else ""
        cells = [x for timing in (forward, step) for x in ((timing.median, timing.spread) if timing else (None, None))]
        line = f"  {name:<23}" + "".join(_number(x, w, 4) for x, w in zip(cells, (9, 8, 9, 8))) + _number(ratio, 7, 2)
        peak = None if row["step_peak"] is None else row["step_peak"] / 2**20
        line += "".join(_number(x, 9, 3) for x in eager) + _number(peak, 9, 1)
        line += "".join(_number(x, 9, 5) for x in errors)
        lines.append(f"{line} {note}{worst}"[:120].rstrip())
        if row["error"]:
            lines.append(f"    {row['error']}"[:120])
    lines.extend(line for name in OURS if name in rows for line in _standing(name, rows))
    return "\n".join(lines)


def _standing(name: str, rows: dict[str, Any]) -> list[str]:
    """How ours stands to eager, to the lower bound, and to itself without a gate."""
    lines = []
    ours = rows[name]
    if "eager" in rows and (speedup := _ratio(rows["eager"], ours, "step")):
        lines.append(f"  {name}: {speedup:.2f} times as fast as eager")
    if "sdpa-ungated" in rows and (slowdown := _ratio(ours, rows["sdpa-ungated"], "step")):
        peaks = ours["step_peak"], rows["sdpa-ungated"]["step_peak"]
        memory = f", {peaks[0] / peaks[1]:.2f} times its memory" if all(peaks) else ""
        lines.append(f"  {name}: {slowdown:.2f} times the step of sdpa-ungated, the lower bound{memory}")
    costs = []
    for part in ("forward", "step"):
        plain = rows.get(f"{name}-ungated")
        if plain and (ratio := _ratio(ours, plain, part)):
            costs.append(f"{part} {_median(ours, part) - _median(plain, part):+.4f} ms ({ratio - 1:+.1%})")
    if costs:
        lines.append(f"  {name}: gate and reweighting cost {', '.join(costs)}")
    return lines


def _ratio(row: dict[str, Any], other: dict[str, Any], part: str) -> float | None:
    a, b = _median(row, part), _median(other, part)
    return a / b if a and b else None


def _best(measurement: dict[str, Any]) -> Timing | None:
    timing = measurement["graph"] or measurement["eager"]
    return Timing(**timing) if timing else None


def _median(row: dict[str, Any], part: str) -> float | None:
    timing = _best(row[part])
    return timing.median if timing else None


def _number(x: float | None, width: int, digits: int) -> str:
    return f"{'-' if x is None else f'{x:.{digits}f}':>{width}}"


def device_facts(device: str) -> tuple[Ceilings, dict[str, str]]:
    """What the device can do; and its name, with the versions of what runs on it."""
    return measured_ceilings(torch.device(device)), versions_on(device)


def versions_on(device: str) -> dict[str, str]:
    """The device's name and the versions of what runs on it."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    if device == "cpu":
        versions |= {"device": _cpu_name(), "threads": str(torch.get_num_threads())}
    if device == "cuda":
        import triton

        versions |= {"triton": triton.__version__, "device": torch.cuda.get_device_name()}
    return versions


def _takes_seconds(shape: Shape, device: str) -> bool:
    return device == "cpu" and shape.B * shape.Hq * shape.N * (shape.N + shape.P) > 1 << 24


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own: what breaks a CUDA context breaks it for one shape only."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(arguments: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=ON_GPU if device == "cuda" else ON_CPU)
    parser.add_argument(
        "--peer", nargs="+", choices=PEERS, default=list(PEERS) if device == "cuda" else list(PEERS_ON_CPU)
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="begin no shape after so many")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/attention.json"), metavar="FILE")
    options = parser.parse_args(arguments)
    started = time.perf_counter()

    options.out.parent.mkdir(parents=True, exist_ok=True)
    ceilings, versions = in_a_process(device_facts, device)
    document: dict[str, Any] = {"versions": versions, "ceilings": asdict(ceilings)}
    document |= {"shapes": [], "errors": {}}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"ceilings: {ceilings.flops / 1e12:.2f} TFLOP/s, {ceilings.bytes / 1e12:.2f} TB/s")
    print("ms a call, on a GPU by graph replay; eager: by the host's clock; ratio: to ours; errors: against float64")
    for name in options.shape:
        if time.perf_counter() - started > options.budget_seconds:
            document["errors"][name] = "left out: the budget was spent"
        else:
            try:
                rounds = QUICK_ROUNDS if options.quick or _takes_seconds(SHAPES[name], device) else ROUNDS
                result = in_a_process(measure_shape, name, options.peer, device, rounds, ceilings)
                document["shapes"].append(result)
                print(f"\n{table(result)}", flush=True)
            except Exception as error:
                document["errors"][name] = first_line(error)
        if name in document["errors"]:
            print(f"\n{name}: {document['errors'][name]}", flush=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if document["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
