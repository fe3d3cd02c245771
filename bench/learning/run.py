"""Run the study that bench/learning.md declares; what is done already is left out.

    python -m qtuning_fast.bench.learning.run --jobs 2                     # everything that is left
    python -m qtuning_fast.bench.learning.run --parts related-16 --minutes 60

Each run is a file `<out>/<stream>/<shots>/<arm>/<draw>.json`. Runs have one thread each. One that was cut off goes on
where it stopped.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtuning_fast.bench.learning.arms import ARMS, LINEAR, PARTS, STUDY_STREAMS, Run, runs_of, smaller
from qtuning_fast.bench.learning.linear import accuracies
from qtuning_fast.bench.learning.pool import parser_of_study, run_each
from qtuning_fast.bench.learning.products import use_onednn
from qtuning_fast.lifelong.base_models import MINILM, load_base_model
from qtuning_fast.lifelong.data.encoding import ExampleEncoder
from qtuning_fast.lifelong.environment import versions
from qtuning_fast.lifelong.evaluation import features
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.tasks import SPLITS
from qtuning_fast.lifelong.trainer import LifelongTrainer
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.model.checked_files import write_json
from qtuning_fast.model.model import QTuningModel

OUT = Path("bench/results/learning")
WORK = Path("runs/learning")
REHEARSAL = {"steps": 2, "eval_every": 1}


class WithRandomQueue(LifelongTrainer):
    """The control: the queue's rows are random, with the mean and the spread that each feature has in the real ones.

    The real rows are what enters and is cut, so that all else is as in the run without the control; what a task then
    computes with is drawn anew.
    """

    @contextmanager
    def _attached(self, *, alone: bool = False) -> Iterator[QTuningModel]:
        with super()._attached(alone=alone) as model:
            prefix = model.training_prefix
            begin, draws = prefix.begin_prompts, torch.Generator().manual_seed(self.options.seed)

            def begin_with_random_rows(prompt_length: int) -> None:
                queue = prefix.queue
                rows, scales = queue.rows, queue.row_scale
                queue.rows = [randomized(real * scale[:, None], draws) for real, scale in zip(rows, scales)]
                queue.row_scale = [torch.ones_like(scale) for scale in scales]
                begin(prompt_length)
                queue.rows, queue.row_scale = rows, scales

            prefix.begin_prompts = begin_with_random_rows  # type: ignore[method-assign]
            yield model


def randomized(rows: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Return random rows `[n, F]` with the mean and the standard deviation of each feature."""
    return rows.mean(0) + rows.std(0, correction=0) * torch.randn(rows.shape, generator=draws)


def result_file(out: Path, run: Run) -> Path:
    return out / f"{run.name}.json"


def one_run(run: Run, out: Path, rehearsal: bool) -> str:
    """Do a run and write its file."""
    torch.set_num_threads(1)
    stream = STUDY_STREAMS[run.stream]
    if rehearsal:
        stream = smaller(stream, 2)
    tasks = stream.load(shots=run.shots, seed=run.draw)
    base, tokenizer = load_base_model(MINILM)
    products = "oneDNN" if use_onednn(base) else "PyTorch's choice"
    began = time.perf_counter()
    if run.arm == LINEAR:
        found: dict[str, Any] = {"accuracy": _linear(base, tokenizer, tasks)}
    else:
        arm = ARMS[run.arm]
        config, training = arm.settings(stream, run.draw)
        if rehearsal:
            training = replace(training, **REHEARSAL)
        work = WORK / ("rehearsal" if rehearsal else "runs") / run.name
        trainer = WithRandomQueue if arm.random_queue else LifelongTrainer
        if arm.random_queue:  # what it has drawn is in no file, so it starts again
            shutil.rmtree(work, ignore_errors=True)
        metrics = trainer(base, tokenizer, config, tasks, training, work).run()
        found = _of_interest(metrics)
    path = result_file(out, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = asdict(run) | {"seconds": round(time.perf_counter() - began, 1)}
    about |= {"tasks": [task.name for task in tasks], "versions": versions(), "products": products}
    write_json(path, about | found)
    if run.arm != LINEAR:
        shutil.rmtree(work)
    return run.name


def _linear(base: Any, tokenizer: Any, tasks: Any) -> dict[str, list[float | None]]:
    config = QTuningConfig()
    encoder = ExampleEncoder(tokenizer, config.task_type, TrainingOptions().max_length)
    model = QTuningModel(base, config)
    described = []
    for task in tasks:
        encoded = {split: encoder.encode(getattr(task, split)) for split in SPLITS}
        splits = {
            split: (features(model, each, 64, task=None), each.columns["labels"]) for split, each in encoded.items()
        }
        described.append((tuple(task.label_names), splits))
    model.detach()
    return accuracies(described)


def _of_interest(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the study needs of a run's metrics."""
    live = metrics["live_queue"]
    unnamed = metrics["class_incremental"]["adapters"]
    return {
        "accuracy": {
            "task_adapter": metrics["task_adapter"]["accuracy_matrix"][-1],
            "live_queue": live["accuracy_matrix"][-1],
        },
        "forgetting": live["forgetting"],
        "class_incremental": unnamed["average_accuracy"],
        "per_task": [
            {name: task[name] for name in ("start", "start_seconds", "seconds", "best_step", "validation_curve")}
            for task in metrics["per_task"]
        ],
        "config": metrics["config"],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run what is left of the study; returns the exit status."""
    parser = parser_of_study(__doc__, OUT, "two steps of two tasks, draw 0 only")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default all, in this order")
    options = parser.parse_args(arguments)
    if options.dry_run and options.out == OUT:
        options.out = WORK / "rehearsed"  # the study's own runs are never those of a rehearsal
    runs = [run for run in runs_of(options.parts) if not options.dry_run or run.draw == 0]
    left = [run for run in runs if not result_file(options.out, run).exists()]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are done", flush=True)
    do = partial(one_run, out=options.out, rehearsal=options.dry_run)
    failed = run_each(left, do, options.jobs, options.minutes)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
