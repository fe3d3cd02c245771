"""The targets for the compute backends, and whether the figures meet them.

A figure is a ratio of two times in the same run. The bounds were set before there were figures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qtuning_fast.bench.figures import median, ratio, slowdowns
from qtuning_fast.bench.shapes import CPU

Documents = Mapping[str, Mapping[str, Any]]  # of one device, by question

AT_MOST, AT_LEAST = "at most", "at least"


GATED = ("composed", "eager", "eager-compiled", "flex", "flex-merged")  # that do what the native backend does
# Where PyTorch's attention does the same work: it has no cap and no packed sequences, and computes what windows hide.
WHOLE_ON_CPU = tuple(
    shape.name for shape in CPU if shape.trained and shape.window is None and not shape.packed and not shape.softcap
)


@dataclass(frozen=True)
class Target:
    """A bound on a figure."""

    of: str
    device: str  # "cpu" or "cuda"
    relation: str
    bound: float
    figure: Callable[[Documents], float | None]  # None: it was not measured
    beside: Callable[[Documents], str] = lambda documents: ""  # printed after the figure

    def verdict(self, documents: Documents) -> str:
        figure = self.figure(documents)
        if figure is None:
            return "not measured"
        kept = figure <= self.bound if self.relation == AT_MOST else figure >= self.bound
        return "met" if kept else "**not met**"


def _rows(documents: Documents, shape: str) -> Mapping[str, Any]:
    for question in ("attention", "decode"):
        entry = documents.get(question, {}).get("entries", {}).get(shape)
        if entry:
            return entry["rows"]
    return {}


def time_ratio(shape: str, peer: str, other: str, documents: Documents, *, which: str = "step") -> float | None:
    """A peer's time over another's."""
    rows = _rows(documents, shape)
    return ratio(rows.get(peer), rows.get(other), which)


def worst_ratio(others: Sequence[str], which: str, documents: Documents) -> float | None:
    """The native backend's time over that of the fastest of others, on the shape where that is the largest."""
    ratios = []
    for shape in WHOLE_ON_CPU:
        over = [time_ratio(shape, "native", other, documents, which=which) for other in others]
        ratios += [max(x for x in over if x)] if any(over) else []
    return max(ratios, default=None)


def peak_ratio(shape: str, peer: str, other: str, documents: Documents) -> float | None:
    peaks = [_rows(documents, shape).get(name, {}).get("peak") for name in (peer, other)]
    return peaks[0] / peaks[1] if all(peaks) else None


def over_context(shape: str, peer: str, documents: Documents) -> float | None:
    """The step over t (1 + 2P/N), where t is the fastest vendor's step on the context alone, square and causal."""
    entry = documents.get("attention", {}).get("entries", {}).get(shape)
    if entry is None:
        return None
    rows, sizes = entry["rows"], entry["shape"]
    alone = [ratio(rows.get(peer), row, "step") for name, row in rows.items() if name.startswith("context-alone")]
    ratios = [x for x in alone if x]
    return max(ratios) / (1 + 2 * sizes["P"] / sizes["N"]) if ratios else None


def of_ceiling(shape: str, peer: str, documents: Documents) -> float | None:
    """The forward pass's matrix products a second, as a share of the measured ceiling."""
    document = documents.get("attention", {})
    entry = document.get("entries", {}).get(shape)
    ms = median(entry["rows"][peer], "forward") if entry and peer in entry["rows"] else None
    if not ms or "work" not in entry:  # without ceilings there is no roofline
        return None
    return entry["work"]["forward"]["flops"] / ms * 1e3 / document["ceilings"]["flops"]


def roofline_beside(shape: str, peers: tuple[str, ...], documents: Documents) -> str:
    """The roofline as a share of each time: a ratio of two times hides what both lose."""
    entry = documents.get("attention", {}).get("entries", {}).get(shape)
    if entry is None or "floor_ms" not in entry:
        return ""
    floor = entry["floor_ms"]["step"][0]
    times = {peer: median(entry["rows"][peer], "step") for peer in peers if peer in entry["rows"]}
    said = [f"{floor / ms:.0%} of {peer}" for peer, ms in times.items() if ms]
    return f"the roofline is {', '.join(said)}" if said else ""


def of_roofline(shape: str, peer: str, documents: Documents) -> float | None:
    """The least time for the needed bytes at the measured bandwidth, as a share of the time."""
    entry = documents.get("decode", {}).get("entries", {}).get(shape)
    ms = median(entry["rows"][peer], "forward") if entry and peer in entry["rows"] else None
    return entry["floor_ms"]["forward"][0] / ms if ms and "floor_ms" in entry else None


def flatness(figure: str, documents: Documents) -> float | None:
    """The last ten tasks over tasks 6 to 15; None: not all tasks were learned."""
    document = documents.get("lifelong", {})
    queue = document.get("entries", {}).get("queue", {})
    if not queue or len(queue["per_task"]) < document["sizes"]["tasks"]:
        return None
    return queue["verdict"]["ratios"].get(figure) if queue["verdict"] else None


def mixed(documents: Documents) -> float | None:
    """The time of a batch of sixteen tasks over that of one task."""
    rows = documents.get("mixed_tasks", {}).get("entries", {}).get("forward", {}).get("rows", {})
    times = [row["eager"]["median"] for name in ("named-16", "one-task") if (row := rows.get(name)) and row["eager"]]
    return times[0] / times[1] if len(times) == 2 else None


def saved(entry: str, case: str, documents: Documents) -> float | None:
    """The time of a step of a case over that of what it is compared with."""
    found = documents.get("drop_in", {}).get("entries", {}).get(entry)
    if found is None or not all(name in found["rows"] for name in (case, found["over"])):
        return None
    return ratio(found["rows"][case], found["rows"][found["over"]], "step")


def slowed(entry: str, beside: int, documents: Documents) -> float | None:
    """How much busy processes slow the native backend, over what they do to PyTorch's attention or torch.compile."""
    found = documents.get("busy", {}).get("entries", {}).get(entry)
    if found is None:
        return None
    by_peer = {peer: slowdowns(found, peer).get(beside) for peer in found["beside"]["0"]}
    ours, others = by_peer.get("native"), [by_peer.get(peer) for peer in ("sdpa", "eager-compiled")]
    worst = max((x for x in others if x), default=None)
    return ours / worst if ours and worst else None


def inferring(model: str, documents: Documents) -> float | None:
    """The time to score a batch among 2,000 tasks over that of the forward pass that yields its features."""
    entry = documents.get("task_inference", {}).get("entries", {}).get(model)
    times = entry["rows"].get("2000", {}).get("ms") if entry else None
    return times["score"]["median"] / times["forward"]["median"] if times else None


def _on_cpu() -> list[Target]:
    found = []
    for shape in WHOLE_ON_CPU:
        bound = {"minilm-48-cpu": 1.2, "t5-large-cpu": 1.15}.get(shape, 1.1)
        ungated = partial(time_ratio, shape, "native", "sdpa")
        found.append(Target(f"native over sdpa, {shape}", "cpu", AT_MOST, bound, ungated))
    for which in ("step", "forward"):
        worst = partial(worst_ratio, GATED, which)
        found.append(Target(f"native over the fastest with a gate, worst shape, {which}", "cpu", AT_MOST, 1.0, worst))
    for shape in ("long-2048-cpu", "long-4096-cpu"):
        figure = partial(time_ratio, shape, "reference", "native")
        found.append(Target(f"reference over native, {shape}", "cpu", AT_LEAST, 3.0, figure))
    peak = partial(peak_ratio, "long-4096-cpu", "native", "sdpa")
    found.append(Target("peak memory, native over sdpa, long-4096-cpu", "cpu", AT_MOST, 1.2, peak))
    for tokens in ("N128", "N48"):
        for beside, count in ((1, "one busy process"), (2, "two busy processes")):
            name = f"slowdown beside {count}, native over the worst of sdpa and torch.compile, {tokens}"
            found.append(Target(name, "cpu", AT_MOST, 1.0, partial(slowed, tokens, beside)))
    for model in ("bert-cpu", "bert-base"):
        scoring = partial(inferring, model)
        found.append(Target(f"scoring 2,000 tasks over a forward pass, {model}", "cpu", AT_MOST, 0.1, scoring))
    return found


def _fused_on_gpu() -> list[Target]:
    found = []

    def target(shape: str, peer: str, other: str, relation: str, bound: float) -> None:
        figure = partial(time_ratio, shape, peer, other)
        beside = partial(roofline_beside, shape, tuple(name for name in (peer, other) if name.startswith("fused")))
        found.append(Target(f"{peer} over {other}, {shape}", "cuda", relation, bound, figure, beside))

    for shape in ("bert-base", "vit-b16", "minilm", "bert-base-512", "llama-8b"):
        target(shape, "flex-frozen-gate", "fused-frozen-gate", AT_LEAST, 1.5)
        target(shape, "flex-merged", "fused", AT_LEAST, 1.0)
        if shape != "llama-8b":
            target(shape, "reference", "fused", AT_LEAST, 4.0)
            target(shape, "fused", "sdpa", AT_MOST, 1.1)
        target(shape, "fused", "fused-plain", AT_MOST, 1.05 if shape in ("bert-base-512", "llama-8b") else 1.15)
    return found


def _composed_on_gpu() -> list[Target]:
    found = []
    for shape in ("llama-8b-4096", "long"):
        alone = partial(over_context, shape, "composed")
        found.append(Target(f"composed over context alone × (1 + 2P/N), {shape}", "cuda", AT_MOST, 1.08, alone))
        for peer, ours, bound in (("flex-frozen-gate", "composed-frozen-gate", 1.5), ("flex-merged", "composed", 1.0)):
            figure = partial(time_ratio, shape, peer, ours)
            found.append(Target(f"{peer} over {ours}, {shape}", "cuda", AT_LEAST, bound, figure))
    products = partial(of_ceiling, "long", "composed")
    found.append(Target("share of the matrix-product ceiling, composed forward, long", "cuda", AT_LEAST, 0.6, products))
    for shape, bound in (("decode-64", 1.35), ("decode-256", 1.35), ("decode-64-mixed", 1.2)):
        figure = partial(time_ratio, shape, "sdpa-no-concat", "composed", which="forward")
        found.append(Target(f"sdpa-no-concat over composed, {shape}", "cuda", AT_LEAST, bound, figure))
        floor = partial(of_roofline, shape, "composed")
        found.append(Target(f"share of the read bandwidth, composed, {shape}", "cuda", AT_LEAST, 0.75, floor))
    return found


def _of_models(device: str) -> list[Target]:
    memory = "resident_bytes" if device == "cpu" else "device_peak_bytes"
    return [
        Target("a forward pass of 16 tasks over one task", device, AT_MOST, 1.15, mixed),
        Target("packed over padded texts of all lengths", device, AT_MOST, 0.5, partial(saved, "packed", "packed")),
        Target("a window over as many scores", device, AT_MOST, 1.3, partial(saved, "window", "window")),
        Target("step, last ten of 200 tasks over tasks 6 to 15", device, AT_MOST, 1.05, partial(flatness, "step_ms")),
        Target("memory, likewise", device, AT_MOST, 1.02, partial(flatness, memory)),
    ]


TARGETS = [*_on_cpu(), *_of_models("cpu"), *_fused_on_gpu(), *_composed_on_gpu(), *_of_models("cuda")]
