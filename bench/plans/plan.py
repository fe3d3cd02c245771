"""What the plans of `bench.run` hold: which steps, in which order, in how many seconds, and what runs beside what.

The order is that of what a step is worth. A step's seconds are its share of the plan. Unused time goes to later steps.
Each step gets a deadline. Within a step units follow each other likewise (`schedule.py`).
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
    module: str  # of the bench package
    seconds: float  # its share of the plan
    arguments: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ("--dry-run",)  # its arguments in a dry run, in place of the others
    out: str = "--out"  # the option that takes the file it writes
    within: bool = False  # whether it takes --deadline, and goes on where a process before it has died
    concurrent: tuple["Step", ...] = ()  # what runs at the same time, and is ended with it
    otherwise: "Step | None" = None  # what has all the rest of the plan when this one fails
    ceilings: bool = False  # whether it takes --ceilings, the file of the step of that name

    def command(self, folder: Path, deadline: float, *, dry_run: bool) -> list[str]:
        given = list(self.rehearsal if dry_run else self.arguments)
        if self.within:
            given += ["--deadline", f"{deadline:.1f}"]
        if self.ceilings:
            given += ["--ceilings", str(folder / "ceilings.json")]
        given += [self.out, str(folder / f"{self.name}.json")]
        return [sys.executable, "-m", f"qtuning_fast.bench.{self.module}", *given]


def all_steps(plan: tuple[Step, ...]) -> Iterator[Step]:
    """Those of a plan, with those beside them and those for when they fail."""
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
GATE_TRAINED = ("bert-base",), ("flex",)  # a row that says why FlexAttention's gate is frozen elsewhere
TUNED_HEAD_SIZES, TUNED_DIRECTIONS = (64, 128), ("keys", "whole", "queries", "forward")
OURS = ("fused", "fused-frozen-gate", "composed", "fused-plain")

_FEW = ("--dry-run", "--peer", "fused", "composed", "sdpa")
_DECODE = Step(
    "decode", "decode", 40, rehearsal=("--dry-run", "--peer", "fused", "composed"), within=True, ceilings=True
)
_INGREDIENTS = Step("ingredients", "ingredients", 600, rehearsal=("--dry-run",))
_GROWTH = Step("growth", "growth", 1200, rehearsal=("--dry-run",))
_MIXED = Step("mixed_tasks", "mixed_tasks", 600, rehearsal=("--dry-run", "--rounds", "2"))
_FIRST = Step("first", "first", 15, otherwise=Step("why", "why", 0))
_CEILINGS = Step("ceilings", "floors", 15)
_ATTENTION = Step("attention", "attention", 170, within=True, ceilings=True)

PLANS: dict[str, tuple[Step, ...]] = {
    "cpu": (
        Step("attention", "attention", 3600, rehearsal=("--dry-run", "--peer", "composed", "eager")),
        Step("decode", "decode", 600, rehearsal=("--dry-run", "--peer", "composed", "sdpa-no-concat")),
        _INGREDIENTS,
        _GROWTH,
        _MIXED,
        Step("lifelong", "lifelong", 1800),
        Step("models", "models", 1800),
    ),
    "gpu": (
        _FIRST,
        Step(
            "tests",
            "gpu_tests",
            125,
            arguments=("--part", "telling"),
            within=True,
            concurrent=(
                Step("ahead", "ahead", 0, arguments=("--plan", "gpu"), within=True),
                Step("memcheck", "memcheck", 0, within=True),
            ),
        ),
        _CEILINGS,
        replace(
            _ATTENTION,
            arguments=("--quick", "--shape", *SHAPES, "--peer", *PEERS),
            rehearsal=(*_FEW, "--shape", "tiny", "tiny-causal"),
        ),
        replace(_DECODE, arguments=("--quick", "--shape", *DECODING, "--peer", *DECODERS)),
        Step(
            "tuning", "tune", 112, arguments=("--head-size", "64", "128", "--direction", *TUNED_DIRECTIONS), within=True
        ),
        Step("counters", "counters", 45),
        replace(
            _ATTENTION,
            name="attention-gate",
            seconds=8,
            arguments=("--quick", "--shape", *GATE_TRAINED[0], "--peer", *GATE_TRAINED[1]),
            rehearsal=("--dry-run", "--peer", "composed", "--shape", "tiny"),
        ),
    ),
    "gpu-second": (
        # What the first call has compiled is there still, if it is the same machine, and this step ends at once.
        Step("ahead", "ahead", 47, arguments=("--plan", "gpu-second"), within=True),
        replace(_CEILINGS, seconds=8),
        replace(
            _ATTENTION,
            name="attention-rest",
            seconds=32,
            arguments=("--quick", "--shape", *SHAPES, "--peer", *PEERS, "--rest-of", str(RUNS / "gpu/attention.json")),
            rehearsal=("--dry-run", "--peer", "composed", "sdpa", "--shape", "tiny-bias"),
        ),
        replace(
            _ATTENTION,
            name="attention-long",
            seconds=40,
            arguments=("--quick", "--shape", *LONG, "--peer", *LONG_PEERS),
            rehearsal=("--dry-run", "--peer", "composed", "sdpa", "--shape", "tiny-causal"),
        ),
        Step("choose", "choose", 25, rehearsal=("--dry-run", "--rounds", "2"), within=True),
        Step(
            "growth",
            "growth",
            20,
            arguments=("--peer", "fused", "composed", "eager", "sdpa", "--with", "N", "P", "tasks"),
            rehearsal=("--dry-run", "--peer", "composed", "--with", "B", "tasks"),
            within=True,
        ),
    ),
    "gpu-models": (
        replace(_INGREDIENTS, seconds=60, arguments=("--quick",), rehearsal=("--dry-run", "--peer", "fused")),
        Step("models", "models", 200),
        Step("lifelong", "lifelong", 210),
        replace(_MIXED, seconds=60),
    ),
}
TOTAL_SECONDS = {"gpu": 530.0, "gpu-second": 172.0, "gpu-models": 530.0}  # of a plan; nothing outlasts it
