"""What it costs to infer the task of an input: to fit the rule once after a task came, and to score a batch.

    python -m qtuning_fast.bench.rows.task_inference
    python -m qtuning_fast.bench.rows.task_inference --model bert-cpu --tasks 15 200 --out FILE

Each task has four classes, of which 16 examples were counted and 16 are kept for calibration. Features are drawn around
random class means, as far apart that some classes are confused, because the search for a temperature depends on that.
Adapters are not needed: fitting reads their descriptions, scoring reads nothing of them. The model has random weights.

`fit` is all that the first inference after a change does beyond its own: reading the tasks, the rule, the calibration.
`score` is what an inference does with a batch's features, up to the names of the tasks. It takes turns with `forward`,
the pass of the base model that yields the features, which any other way to infer tasks needs at least, and with
`record`, which counts one task's examples and keeps those for calibration; they need PASSES forward passes before.

The predictions are counted work at the speeds of float64 products and of memory that the same run measures: a product
of factors for the scatters, products of the means and of the calibration's examples, and SWEEPS passes over their
scores; for a batch the larger of the product and of reading its matrix. They leave out whatever is done task by task.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.bench.measure import default_device
from qtuning_fast.bench.memory import peak_of
from qtuning_fast.bench.rows.architectures import MODELS, Model, base_model, random_batch
from qtuning_fast.bench.rows.command import Command, measure_each
from qtuning_fast.bench.rows.roofline import Ceilings, measured_ceilings
from qtuning_fast.bench.timing import Call, compare, timing_of
from qtuning_fast.method.adapter import AdapterInfo
from qtuning_fast.method.shared_gaussian import SharedGaussian
from qtuning_fast.method.statistics import Recorder, TaskStatistics
from qtuning_fast.method.task_inference import CALIBRATED_ON, FittedRule
from qtuning_fast.method.task_rule import Evidence
from qtuning_fast.model.known_tasks import KnownTasks
from qtuning_fast.model.registry import AdapterRegistry, StatisticsRegistry

TASKS, FEW = (15, 200, 2000), (2, 5)
ON_CPU, ON_GPU, TINY = ("bert-cpu", "bert-base"), ("bert-base",), ("bert-tiny",)
CLASSES, EXAMPLES = 4, 16  # of a task; counted of a class, and as many for calibration
SAMPLES = 16  # of a batch
APART = 0.1**0.5  # the standard deviation of class means, over that of examples around them
CHECKED = 256  # new examples whose tasks are inferred
PASSES = 2 * CLASSES * EXAMPLES // SAMPLES
ROUNDS, DRY_ROUNDS = 5, 2
FITS, DRY_FITS = 3, 1
FLOAT64 = 8  # bytes
SWEEPS = 80  # of the scores in memory: eight steps of Newton's method with about ten reads and writes; assumed


class Drawn:
    """Features of tasks, drawn anew as often as they are asked for.

    Args:
        size: F.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(0)
        self._means: list[Tensor] = []  # of each task's classes

    def examples(self, task: int) -> tuple[Tensor, Tensor]:
        """Features `[64, F]` of unit root mean square, and labels."""
        while len(self._means) <= task:
            self._means.append(APART * self._normal(CLASSES))
        labels = torch.arange(CLASSES * EXAMPLES) % CLASSES
        features = self._means[task][labels] + self._normal(len(labels))
        return features / features.square().mean(1, keepdim=True).sqrt(), labels

    def _normal(self, rows: int) -> Tensor:
        return torch.randn(rows, self.size, generator=self._generator)


def recorded(counted: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor]) -> TaskStatistics:
    recorder = Recorder(CLASSES)
    recorder.add(*counted)
    return recorder.finish([kept])


class Tasks:
    """Tasks of a model, of whose adapters there are only descriptions."""

    def __init__(self, model: QTuningModel) -> None:
        self.adapters, self.drawn = AdapterRegistry(), Drawn(model.hidden_size)
        self.known = KnownTasks(self.adapters, StatisticsRegistry(), model.backbone)

    def learn(self, count: int) -> None:
        """Add tasks until there are so many."""
        for number in range(len(self.adapters), count):
            name = f"task-{number}"
            labels = tuple(map(str, range(CLASSES)))
            self.adapters.add(AdapterInfo(name, labels, None, None, 0, prefix_rows=0, classes=CLASSES, bytes=0))
            self.known.add(name, recorded(self.drawn.examples(number), self.drawn.examples(number)))

    def fit(self) -> FittedRule:
        """Fit the rule anew, because the last task's statistics were recorded again."""
        name = list(self.adapters)[-1]
        self.known.add(name, self.known.statistics[name])
        return self.known.fitted()

    def found(self, choice: FittedRule) -> float:
        """The share of new examples whose task is inferred."""
        some = range(0, len(self.adapters), -(-len(self.adapters) * EXAMPLES // CHECKED))
        features = torch.cat([self.drawn.examples(task)[0][:EXAMPLES] for task in some])
        right = [f"task-{task}" for task in some for _ in range(EXAMPLES)]
        names = choice.infer(evidence(features.to(choice.device))).task_names
        return sum(a == b for a, b in zip(names, right)) / len(right)


@dataclass(frozen=True)
class Predicted:
    """What was said before it was measured."""

    fit_seconds: float
    score_ms: float
    statistics_bytes: int
    rule_bytes: int


def predicted(tasks: int, size: int, host: Ceilings, device: Ceilings) -> Predicted:
    """Counted work at float64 speeds: those of the host, where rules are fitted, and of the device, which scores."""
    n, classes = CLASSES * EXAMPLES, tasks * CLASSES
    kept = min(n, max(1, CALIBRATED_ON // tasks)) * tasks
    scatters = tasks * min(n, size) * size**2
    flops = 2 * (scatters + 2 * classes * size**2 + kept * size * (classes + size))
    score_flops = 2 * SAMPLES * size * (classes + size)
    rule = FLOAT64 * (classes * (size + 1) + size**2)
    each = FLOAT64 * ((min(n, size) + CLASSES) * size + CLASSES + n) + 4 * n * size
    return Predicted(
        fit_seconds=flops / host.flops + SWEEPS * FLOAT64 * kept * classes / host.bytes,
        score_ms=1e3 * max(score_flops / device.flops, rule / device.bytes),
        statistics_bytes=tasks * each,
        rule_bytes=rule,
    )


def evidence(features: Tensor) -> Evidence:
    return Evidence(features, lambda: {})


def bytes_of(choice: FittedRule) -> int:
    """The bytes of a fitted rule's matrices."""
    gaussian = choice.gaussian
    assert isinstance(gaussian, SharedGaussian)
    return sum(x.nbytes for x in (gaussian.linear.weight, gaussian.linear.bias, gaussian.whitening))


def measure(name: str, counts: Sequence[int], device: str, rounds: int, fits: int) -> dict[str, Any]:
    """Measures one model with more and more tasks; returns the entry of the file of results."""
    started, shape, gpu = time.perf_counter(), replace(MODELS[name], batch=SAMPLES), torch.device(device)
    model = QTuningModel(base_model(shape, device), QTuningConfig()).eval()
    tasks, batch = Tasks(model), _inputs(shape, device)
    host = measured_ceilings(torch.device("cpu"), dtype=torch.float64)
    there = host if device == "cpu" else measured_ceilings(gpu, dtype=torch.float64)
    rows = {}
    for count in counts:
        said = predicted(count, model.hidden_size, host, there)
        rows[str(count)] = {"predicted": asdict(said)} | with_tasks(model, tasks, count, batch, rounds, fits)
    return {
        "of": shape.of,
        "sizes": {"hidden": model.hidden_size, "samples": SAMPLES, "tokens": shape.tokens, "classes": CLASSES},
        "ceilings": {"host": asdict(host), "device": asdict(there)},
        "rows": rows,
        "passes_to_record": PASSES,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _inputs(shape: Model, device: str) -> dict[str, Tensor]:
    ids = random_batch(shape, device)["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def with_tasks(
    model: QTuningModel, tasks: Tasks, count: int, batch: dict[str, Tensor], rounds: int, fits: int
) -> dict[str, Any]:
    """The row of so many tasks."""
    tasks.learn(count)
    peak = peak_of(tasks.fit, torch.device("cpu"))  # and warms up
    seconds = []
    for _ in range(fits):
        start = time.perf_counter()
        choice = tasks.fit()
        seconds.append(time.perf_counter() - start)
    counted, kept = tasks.drawn.examples(0), tasks.drawn.examples(0)
    features = counted[0][:SAMPLES].to(model.device)
    calls: dict[str, Call] = {
        "forward": lambda: model.features(batch, task=None),
        "score": lambda: choice.infer(evidence(features)).task_names,
        "record": lambda: recorded(counted, kept),
    }
    return {
        "fit_seconds": asdict(timing_of(seconds)),
        "fit_peak_bytes": peak,
        "statistics_bytes": tasks.known.statistics.bytes_in_memory,
        "rule_bytes": bytes_of(choice),
        "temperature": choice.temperature,
        "task_found": tasks.found(choice),
        "ms": _in_turns(calls, model, rounds),
    }


def _in_turns(calls: dict[str, Call], model: QTuningModel, rounds: int) -> dict[str, Any]:
    setups: dict[str, Callable[[], list[Call]]] = {name: partial(list, [call]) for name, call in calls.items()}
    times = compare(setups, device=model.device, rounds=rounds, graphs=False)
    if errors := {name: each.error for name, each in times.items() if each.eager is None}:
        raise RuntimeError(f"it could not be timed: {errors}")
    return {name: asdict(each.eager) for name, each in times.items() if each.eager}


def table(entry: dict[str, Any]) -> str:
    """One model as text; predictions in brackets."""
    size, passes = entry["sizes"], entry["passes_to_record"]
    lines = [
        f"{entry['of']}: {size['hidden']} features, {size['samples']} samples of {size['tokens']} tokens",
        f"  {'tasks':>6}{'fit s':>17}{'peak MB':>9}{'statistics MB':>14}{'rule MB':>9}{'score ms':>16}"
        f"{'forward ms':>12}{'ratio':>8}{'record ms':>11}{'found':>7}",
    ]
    for count, row in entry["rows"].items():
        said, ms = row["predicted"], {name: each["median"] for name, each in row["ms"].items()}
        fit = f"{row['fit_seconds']['median']:.3f} ({said['fit_seconds']:.3f})"
        score, peak = f"{ms['score']:.2f} ({said['score_ms']:.2f})", row["fit_peak_bytes"]
        lines.append(
            f"  {count:>6}{fit:>17}{'-' if peak is None else f'{peak / 2**20:.0f}':>9}"
            f"{row['statistics_bytes'] / 2**20:>14.1f}{row['rule_bytes'] / 2**20:>9.1f}{score:>16}"
            f"{ms['forward']:>12.1f}{ms['score'] / ms['forward']:>8.3f}{ms['record']:>11.2f}{row['task_found']:>7.2f}"
        )
    return "\n".join([*lines, f"  ratio: score over forward; to record a task takes {passes} forward passes, too"])


def main(arguments: list[str] | None = None) -> int:
    device = default_device()
    line = Command(__spec__.name, __doc__, dry_run="a tiny model and few tasks, to see that it runs")
    line.add_argument("--model", nargs="+", choices=MODELS, help="default: those of the device")
    line.add_argument("--tasks", nargs="+", type=int, metavar="T", help="default: 15, 200 and 2000")
    options = line.parse(arguments)
    chosen = options.model or (TINY if options.dry_run else ON_GPU if device == "cuda" else ON_CPU)
    counts = sorted(options.tasks or (FEW if options.dry_run else TASKS))
    rounds, fits = (DRY_ROUNDS, DRY_FITS) if options.dry_run else (ROUNDS, FITS)
    results = line.results(options, rounds=rounds, fits=fits)
    jobs = {name: partial(measure, name, counts, device, rounds, fits) for name in chosen}
    return measure_each(results, jobs, table)


if __name__ == "__main__":
    sys.exit(main())
