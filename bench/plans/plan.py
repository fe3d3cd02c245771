"""The plans of `plans.run`: which steps, in which order, for how many seconds, and what runs beside what.

Steps come in the order of what they are worth. The seconds of a step are its share of the plan; unused time goes to
later steps. Each step gets a deadline, and its units follow each other by `schedule.py`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qtuning_fast.bench.results import RUNS


@dataclass(frozen=True)
class Step:
    """One command of a plan."""

    name: str
    module: str  # below qtuning_fast.bench
    seconds: float  # its share of the plan
    arguments: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ()  # its arguments in a dry run, in place of the others and after --dry-run
    within: bool = False  # whether it takes --deadline, and goes on where an earlier process has died
    concurrent: tuple["Step", ...] = ()  # steps that run at the same time and end with it
    otherwise: "Step | None" = None  # the step that gets the rest of the plan if this one fails
    ceilings: bool = False  # whether it takes --ceilings, the file of the step of that name

    def command(self, folder: Path, deadline: float, *, dry_run: bool) -> list[str]:
        """What runs it, and writes NAME.json into the folder."""
        given = ["--dry-run", *self.rehearsal] if dry_run else list(self.arguments)
        if self.within:
            given += ["--deadline", f"{deadline:.1f}"]
        if self.ceilings:
            given += ["--ceilings", str(folder / "ceilings.json")]
        given += ["--out", str(folder / f"{self.name}.json")]
        return [sys.executable, "-m", f"qtuning_fast.bench.{self.module}", *given]


def all_steps(plan: tuple[Step, ...]) -> Iterator[Step]:
    """The steps of a plan, those that run beside them and those for when they fail."""
    for step in plan:
        yield step
        yield from step.concurrent
        if step.otherwise is not None:
            yield step.otherwise


# Shapes and peers, the most important first; those that torch.compile may take long for come last.
SHAPES = ("bert-base", "bert-base-512", "vit-b16", "llama-8b", "minilm")
PEERS = (
    *("fused", "sdpa", "sdpa-no-concat", "composed", "fused-plain", "eager"),
    *("fused-frozen-gate", "flex-frozen-gate", "flex-merged", "reference"),
)
DECODING, DECODERS = ("decode-64", "decode-64-mixed", "decode-256"), ("composed", "fused", "sdpa-no-concat")
LONG = ("llama-8b-4096", "long")
LONG_PEERS = ("composed", "sdpa", "context-alone", "composed-frozen-gate", "eager", "flex-frozen-gate", "flex-merged")
DROP_IN = ("bert-base-packed", "mistral-8k", "modernbert-8k", "gemma-2", "bert-base-third")
DROP_IN_PEERS = ("fused", "fused-frozen-gate", "sdpa", "eager", "flex-frozen-gate")
GATE_TRAINED = ("bert-base",), ("flex",)  # a row that says why FlexAttention's gate is frozen elsewhere
TUNED_HEAD_SIZES, TUNED_DIRECTIONS = (64, 128), ("keys", "whole", "queries", "forward")
OURS = ("fused", "fused-frozen-gate", "composed", "fused-plain")


def _operator(name: str, seconds: float, chosen: str, tiny: str) -> Step:
    """The operator beside its peers on a GPU: the options of the step, and of its dry run."""
    options = ("--quick", *chosen.split())
    return Step(name, "rows.attention", seconds, options, tuple(tiny.split()), within=True, ceilings=True)


def _of(shapes: tuple[str, ...], peers: tuple[str, ...]) -> str:
    return " ".join(("--shape", *shapes, "--peer", *peers))


_SMOKE = Step("smoke", "plans.smoke", 15, otherwise=Step("diagnose", "plans.diagnose", 0))
_CEILINGS = Step("ceilings", "rows.roofline", 15)
_INGREDIENTS = Step("ingredients", "rows.ingredients", 600)
_MIXED = Step("mixed_tasks", "rows.mixed_tasks", 600)
_PRECOMPILE = Step("precompile", "plans.precompile", 0, ("--plan", "gpu"), within=True)
_TUNED = ("--head-size", *map(str, TUNED_HEAD_SIZES), "--direction", *TUNED_DIRECTIONS)
_GROWN = ("--peer", "fused", "composed", "eager", "sdpa", "--with", "N", "P", "tasks")
_DECODE = ("--decode", "--peer", "composed", "sdpa-no-concat")

PLANS: dict[str, tuple[Step, ...]] = {
    "cpu": (
        Step("attention", "rows.attention", 3600, rehearsal=("--peer", "composed", "eager")),
        Step("decode", "rows.attention", 600, ("--decode",), rehearsal=_DECODE),
        _INGREDIENTS,
        Step("drop_in", "rows.drop_in", 300),
        Step("busy", "rows.busy", 600),
        Step("growth", "rows.growth", 1200),
        _MIXED,
        Step("lifelong", "rows.lifelong", 1800),
        Step("models", "rows.models", 1800),
        Step("task_inference", "rows.task_inference", 900),
    ),
    "gpu": (
        _SMOKE,
        Step(
            *("tests", "plans.gpu_tests", 125, ("--part", "telling")),
            within=True,
            concurrent=(_PRECOMPILE, Step("memcheck", "plans.memcheck", 0, within=True)),
        ),
        _CEILINGS,
        _operator("attention", 170, _of(SHAPES, PEERS), "--peer fused composed sdpa --shape tiny tiny-causal"),
        _operator("decode", 40, f"--decode {_of(DECODING, DECODERS)}", "--decode --peer fused composed"),
        Step("tuning", "plans.tune", 112, _TUNED, within=True),
        Step("counters", "plans.counters", 45),
        _operator("attention-gate", 8, _of(*GATE_TRAINED), "--peer composed --shape tiny"),
    ),
    "gpu-second": (
        # If it is the same machine, what the first call has compiled is still there, and this step ends at once.
        replace(_PRECOMPILE, seconds=47, arguments=("--plan", "gpu-second")),
        replace(_CEILINGS, seconds=8),
        _operator(
            *("attention-rest", 32),
            f"{_of(SHAPES, PEERS)} --rest-of {RUNS / 'gpu/attention.json'}",
            "--peer composed sdpa --shape tiny-bias",
        ),
        _operator("attention-long", 40, _of(LONG, LONG_PEERS), "--peer composed sdpa --shape tiny-causal"),
        Step("choose", "plans.rank_backends", 25, rehearsal=("--rounds", "2"), within=True),
        Step("growth", "rows.growth", 20, _GROWN, ("--peer", "composed", "--with", "B", "tasks"), within=True),
    ),
    "gpu-drop-in": (
        replace(_PRECOMPILE, seconds=60, arguments=("--plan", "gpu-drop-in")),
        replace(_CEILINGS, seconds=10),
        _operator("attention-drop-in", 90, _of(DROP_IN, DROP_IN_PEERS), "--peer composed --shape tiny-packed"),
        Step("drop_in", "rows.drop_in", 80, ("--quick",)),
    ),
    "gpu-models": (
        replace(_INGREDIENTS, seconds=50, arguments=("--quick",), rehearsal=("--peer", "fused")),
        Step("models", "rows.models", 235),
        Step("lifelong", "rows.lifelong", 195),
        replace(_MIXED, seconds=50),
    ),
}
TOTAL_SECONDS = {
    "gpu": 530.0,
    "gpu-second": 172.0,
    "gpu-drop-in": 240.0,
    "gpu-models": 530.0,
}  # of a plan; nothing outlasts it
