"""Run the study of images that bench/images.md declares; what is done already is left out.

    python -m qtuning_fast.bench.images.run --model runs/dinov2-small --jobs 2

Each run is a file `<out>/<arm>/<seed>.json`. Runs have one thread each. One that was cut off goes on where it stopped.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtuning_fast.bench.images.arms import ARMS, GATE_ARMS, STREAM, Run, all_runs, rule_of
from qtuning_fast.bench.learning.pool import parser_of_study, run_each
from qtuning_fast.bench.learning.products import use_onednn
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.environment import versions
from qtuning_fast.lifelong.metrics import unnamed_results
from qtuning_fast.lifelong.streams import STREAMS, load_stream
from qtuning_fast.lifelong.trainer import LifelongTrainer
from qtuning_fast.model.checked_files import write_json
from qtuning_fast.model.fingerprint import fingerprint

OUT = Path("bench/results/images")
WORK = Path("runs/images")
MEASURES = ("average_accuracy", "cumulative_average_accuracy", "forgetting", "task_found", "accuracy_matrix")


def result_file(out: Path, run: Run) -> Path:
    return out / f"{run.name}.json"


def one_run(run: Run, model: str, out: Path, rehearsal: bool) -> None:
    """Do a run and write its file."""
    torch.set_num_threads(1)
    tasks = load_stream(STREAM, seed=run.seed, **({"test_size": 8} if rehearsal else {}))
    base, processor = load_base_model(model, "image-classification")
    products = "oneDNN" if use_onednn(base) else "PyTorch's choice"
    arm = (ARMS | GATE_ARMS)[run.arm]
    config, training = arm.settings(STREAMS[STREAM], run.seed)
    work = WORK / ("rehearsal" if rehearsal else "runs") / run.name
    began = time.perf_counter()
    metrics = LifelongTrainer(
        base, processor, config, tasks[:2] if rehearsal else tasks, training, work, task_rule=rule_of(arm)
    ).run()
    path = result_file(out, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = asdict(run) | {"seconds": round(time.perf_counter() - began, 1), "versions": versions()}
    size = getattr(processor, "crop_size", None) or processor.size
    about |= {"products": products, "model": fingerprint(base), "pixels": size["height"]}
    write_json(path, about | of_interest(metrics))
    shutil.rmtree(work)


def of_interest(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the study needs of a run's metrics."""
    found = unnamed_results(metrics)
    return {
        "tasks": metrics["tasks"],
        "answers": {
            name: {measure: answers[measure] for measure in MEASURES if measure in answers}
            for name, answers in found.items()
        },
        "named": metrics["task_adapter"]["accuracy_matrix"][-1],
        "step_seconds": [task["step_seconds"] for task in metrics["per_task"]],
        "gates": [task["gate"] for task in metrics["per_task"]],
        "config": metrics["config"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run what is left of the study; returns the exit status."""
    parser = parser_of_study(__doc__, OUT, "two tasks with few test images, seed 0 only")
    parser.add_argument("--model", required=True, help="a folder of DINOv2-small, or its name on the hub")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *GATE_ARMS], help="default all")
    options = parser.parse_args(arguments)
    if options.dry_run and options.out == OUT:
        options.out = WORK / "rehearsed"  # the study's own runs are never those of a rehearsal
    runs = [run for run in all_runs() if options.arms is None or run.arm in options.arms]
    runs = [run for run in runs if not options.dry_run or run.seed == 0]
    left = [run for run in runs if not result_file(options.out, run).exists()]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are done", flush=True)
    do = partial(one_run, model=options.model, out=options.out, rehearsal=options.dry_run)
    return 1 if run_each(left, do, options.jobs, options.minutes) else 0


if __name__ == "__main__":
    sys.exit(main())
