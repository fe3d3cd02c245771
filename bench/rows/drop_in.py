"""What windows and packed sequences save, beside the same work without them.

    python -m qtuning_fast.bench.rows.drop_in

- *packed*: texts whose mean length is a third of the longest, packed into one row, beside the same texts padded.
- *window*: a window of 128 keys over a long text, beside as many visible scores without a window: as many queries, all
  of which see the same 129 keys.

All of an entry take turns in one run. Beside ours stand PyTorch's attention, which takes a window as a mask of all
scores, and FlexAttention, which takes both as block masks and on a CPU computes forward only.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from qtuning_fast.bench import shapes
from qtuning_fast.bench.measure import TURNS, as_json, default_device, default_dtype, measure_cases
from qtuning_fast.bench.plans.triton_cache import settle
from qtuning_fast.bench.rows import tables
from qtuning_fast.bench.rows.command import Command, measure_each, turns_of
from qtuning_fast.bench.shapes import Shape, twin
from qtuning_fast.bench.timing import Turns


@dataclass(frozen=True)
class Question:
    """What is compared: cases by name, each a shape and a peer, and the one that the others' times are given over."""

    about: str
    over: str
    cases: dict[str, tuple[Shape, str]]


def questions(device: str, *, tiny: bool = False) -> dict[str, Question]:
    """The questions, with shapes for a device."""
    on_gpu, ours = device == "cuda", "fused" if device == "cuda" else "native"
    padded = shapes.THIRD if on_gpu else twin(shapes.THIRD, B=16)
    windowed = shapes.MODERNBERT if on_gpu else twin(shapes.MODERNBERT, Hq=4, Hkv=4)
    if tiny:
        padded, windowed = replace(shapes.TINY, padding=2 / 3), replace(shapes.TINY, window=(3, 3))
    packed = replace(padded, packed=True)
    bare = replace(windowed, window=None, context=windowed.reach)
    flex = "flex-frozen-gate"
    found = {
        "packed": Question(
            f"texts of all lengths, mean a third of the longest: {padded}",
            "padded",
            {
                "padded": (padded, ours),
                "packed": (packed, ours),
                "padded, sdpa": (padded, "sdpa"),
                f"packed, {flex}": (packed, flex),
            },
        ),
        "window": Question(
            f"a window over a long text: {windowed}",
            "as many scores",
            {
                "as many scores": (bare, ours),
                "window": (windowed, ours),
                "window, sdpa": (windowed, "sdpa"),
                f"window, {flex}": (windowed, flex),
            },
        ),
    }
    if not on_gpu:
        return found
    both = {f"padded, {name}": (padded, name) for name in ("composed", flex)}
    return found | {"packed": replace(found["packed"], cases=found["packed"].cases | both)}


def measure(question: Question, device: str, turns: Turns) -> dict[str, Any]:
    """The entry of a question."""
    rows = measure_cases(question.cases, device, default_dtype(device), turns)
    names = {name: str(shape) for name, (shape, _) in question.cases.items()}
    return {"about": question.about, "over": question.over, "shapes": names, "rows": as_json(rows)}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the results; return the exit status."""
    line, device = Command(__spec__.name, __doc__, quick=True), default_device()
    options = line.parse(arguments)
    settle()
    results, turns = line.results(options), turns_of(options, TURNS)
    asked = questions(device, tiny=options.dry_run)
    jobs = {name: partial(measure, question, device, turns) for name, question in asked.items()}
    return measure_each(results, jobs, tables.drop_in)


if __name__ == "__main__":
    sys.exit(main())
