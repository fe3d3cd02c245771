"""Each target is measured by the plans, and compares only what was measured alike."""

from dataclasses import asdict

import pytest

from qtuning_fast.bench.plans import plan
from qtuning_fast.bench.plans.plan import PLANS, all_steps
from qtuning_fast.bench.report.targets import TARGETS, time_ratio
from qtuning_fast.bench.rows import attention, drop_in
from qtuning_fast.bench.rows.roofline import Ceilings, of_passes
from qtuning_fast.bench.shapes import SHAPES

CEILINGS = Ceilings(flops=1e15, copied=3e12, read=3e12, special=0.0)
TIMING = {"median": 1.0, "spread": 0.0, "rounds": 1}
ROW = {name: {"graph": TIMING, "eager": TIMING} for name in ("forward", "backward", "step")}
ROW |= {"turns": True, "peak": 1, "errors": {}, "error": ""}


@pytest.fixture(scope="module")
def documents():
    """What the plans of a GPU bring home, if nothing is left out."""
    found = {}
    for step in (step for name, steps in PLANS.items() if name != "cpu" for step in all_steps(steps)):
        question = step.name.partition("-")[0]
        if question in ("attention", "decode"):
            entries = found.setdefault(question, {"entries": {}, "ceilings": vars(CEILINGS)})["entries"]
            options = attention.command().parse_args(list(step.arguments))
            for shape in (SHAPES[name] for name in options.shape):
                entry = entries.setdefault(shape.name, entry_of(shape) | {"rows": {}})
                entry["rows"] |= dict.fromkeys(options.peer, ROW)
        elif question == "mixed_tasks":
            rows = {name: {"eager": TIMING} for name in ("named-16", "one-task")}
            found[question] = {"entries": {"forward": {"rows": rows}}}
        elif question == "drop_in":
            rows = {name: dict.fromkeys(asked.cases, ROW) for name, asked in drop_in.questions("cuda").items()}
            over = {name: asked.over for name, asked in drop_in.questions("cuda").items()}
            found[question] = {"entries": {name: {"over": over[name], "rows": rows[name]} for name in rows}}
        elif question == "lifelong":
            verdict = {"ratios": {"step_ms": 1.0, "device_peak_bytes": 1.0}}
            found[question] = {"entries": {"queue": {"per_task": [0], "verdict": verdict}}, "sizes": {"tasks": 1}}
    return found


def entry_of(shape):
    return {"shape": asdict(shape) | {"M": shape.M}} | of_passes(shape, 2, CEILINGS)


@pytest.mark.parametrize("target", [p for p in TARGETS if p.device == "cuda"], ids=lambda target: target.of)
def test_every_target_for_a_gpu_is_measured_by_the_plans(target, documents):
    assert target.figure(documents) is not None


def test_a_row_that_took_turns_is_not_compared_with_one_that_was_timed_alone(documents):
    rows = {"fused": ROW, "sdpa": ROW | {"turns": False}, "eager": ROW}
    entries = {"attention": {"entries": {"bert-base": {"rows": rows}}}}
    assert time_ratio("bert-base", "fused", "sdpa", entries) is None
    assert time_ratio("bert-base", "fused", "eager", entries) == 1.0


def test_flex_with_its_gate_trained_is_measured_on_one_shape(documents):
    rows = {name: entry["rows"] for name, entry in documents["attention"]["entries"].items()}
    assert [name for name, peers in rows.items() if "flex" in peers] == list(plan.GATE_TRAINED[0])
