"""Metrics of a run: accuracy, forgetting, and transfer between tasks.

`R[i][j]` is the accuracy on task `j` after training on task `i`; above the diagonal it is undefined (None). A task with
several labels a text, or with numbers, has another measure in its place, which its `metric` in `per_task` names
(`qtuning_fast.lifelong.scores`).
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from qtuning_fast.lifelong.scores import WORDS

Metrics = Mapping[str, Any]  # the content of a run's metrics.json

EVALUATIONS = ("task_adapter", "live_queue")
MEASURES = ("average_accuracy", "forgetting", "backward_transfer")
UNNAMED_MEASURES = {  # of answers without the task's name, with the words for readers
    "task_found": "task found",
    "average_accuracy": "average accuracy (FA)",
    "cumulative_average_accuracy": "cumulative average accuracy (CA)",
    "forgetting": "forgetting",
    "label_accuracy": "accuracy by label name",
}


def evaluation_summary(
    accuracy_matrix: Sequence[Sequence[float | None]],
    alone: Sequence[float | None] | None = None,
    *,
    least: float = 0.0,
) -> dict[str, Any]:
    """Summarise one evaluation of a run.

    Args:
        accuracy_matrix: `T` rows of `T` fractions in [0, 1]; None above the diagonal.
        alone: the accuracy of each of the `T` tasks when it is learned alone, with the same budget and seed, an empty
            queue and a fresh shared prompt. None where it was not measured; the first task never needs it.
        least: the least that a task's measure can be: -1 if a task's is a correlation.

    Returns:
        A dict, ready for JSON:

        - `accuracy_matrix`: the matrix in plain floats.
        - `average_accuracy`: mean of the last row.
        - `forgetting`: mean over `j < last` of `max_i R[i][j] - R[last][j]`; 0 for a single task.
        - `backward_transfer`: mean over `j < last` of `R[last][j] - R[j][j]`; 0 for a single task.
        - `forward_transfer`: mean of `R[j][j] - alone[j]` over the tasks with a value in `alone`; None without any.

    Raises:
        ValueError: the matrix or the list has the wrong shape, or an accuracy is outside [`least`, 1].
    """
    R = _lower_triangle(accuracy_matrix, least)
    tasks, final, learned = len(R), R[-1], R.diagonal()
    lost = np.nanmax(R, axis=0) - final
    gained = final - learned
    return {
        "accuracy_matrix": [[float(R[i, j]) if j <= i else None for j in range(tasks)] for i in range(tasks)],
        "average_accuracy": float(final.mean()),
        "forgetting": float(lost[:-1].mean()) if tasks > 1 else 0.0,
        "backward_transfer": float(gained[:-1].mean()) if tasks > 1 else 0.0,
        "forward_transfer": _forward_transfer(learned, alone),
    }


def _lower_triangle(accuracy_matrix: Sequence[Sequence[float | None]], least: float) -> np.ndarray:
    """The matrix as float64 `[T, T]`, NaN above the diagonal."""
    tasks = len(accuracy_matrix)
    if tasks == 0 or any(len(row) != tasks for row in accuracy_matrix):
        lengths = [len(row) for row in accuracy_matrix]
        raise ValueError(f"accuracy_matrix must be square with at least one row, got rows of length {lengths}")
    R = np.array(accuracy_matrix, dtype=np.float64)
    known = R[np.tri(tasks, dtype=bool)]
    if not np.all((known >= least) & (known <= 1)):
        raise ValueError(f"accuracy_matrix must hold fractions in [{least:g}, 1] on and below the diagonal")
    if not np.all(np.isnan(R[~np.tri(tasks, dtype=bool)])):
        raise ValueError("accuracy_matrix must be None above the diagonal, where no task has been learned yet")
    return R


def _forward_transfer(learned: np.ndarray, alone: Sequence[float | None] | None) -> float | None:
    if alone is None:
        return None
    if len(alone) != len(learned):
        raise ValueError(f"alone must hold one entry per task ({len(learned)}), got {len(alone)}")
    gains = learned[1:] - np.array(alone[1:], dtype=np.float64)
    known = gains[~np.isnan(gains)]
    return float(known.mean()) if known.size else None


def measured(metrics: Metrics) -> str:
    """The word for what the numbers of a run are: accuracy, another measure, or score if tasks have different ones."""
    words = {WORDS[task.get("metric", "accuracy")] for task in metrics.get("per_task", ())}
    return "score" if len(words) > 1 else next(iter(words), "accuracy")


def in_words(name: str, word: str) -> str:
    """A name or a sentence for readers, with the word of `measured` in place of accuracy."""
    return name.replace("_", " ").replace("accuracy", word).replace("Accuracy", word[0].upper() + word[1:])


def evaluations_and_baselines(metrics: Metrics) -> dict[str, dict[str, Any]]:
    """The results of a run by name: its evaluations, then its baselines."""
    return {name: metrics[name] for name in EVALUATIONS if name in metrics} | metrics.get("baselines", {})


def final_accuracies(metrics: Metrics) -> dict[str, list[float]]:
    """The accuracy on each task at the end of the run, by evaluation or baseline."""
    return {
        name: result["accuracy_matrix"][-1] if name in EVALUATIONS else result["accuracy"]
        for name, result in evaluations_and_baselines(metrics).items()
    }


def unnamed_results(metrics: Metrics) -> dict[str, dict[str, Any]]:
    """The results without the task's name, by evaluation and baseline; empty for a run that has none."""
    block = metrics.get("class_incremental")
    if block is None:
        return {}
    return unnamed_evaluations(block) | block.get("baselines", {})


def unnamed_evaluations(block: Mapping[str, Any]) -> dict[str, Any]:
    """What a block `class_incremental` says of each way to answer, without its baselines."""
    return {name: each for name, each in block.items() if isinstance(each, Mapping) and "average_accuracy" in each}


def named_summary(metrics: Metrics) -> dict[str, float]:
    """What the stored adapters reach when the task is named, by those of `UNNAMED_MEASURES` that make sense then.

    Empty if a task has another measure than accuracy, which is not comparable.
    """
    if "task_adapter" not in metrics or measured(metrics) != "accuracy":
        return {}
    result = metrics["task_adapter"]
    rows = [fmean(row[: place + 1]) for place, row in enumerate(result["accuracy_matrix"])]
    known = {measure: result[measure] for measure in ("average_accuracy", "forgetting") if measure in result}
    return known | {"cumulative_average_accuracy": fmean(rows)}


def mean_and_spread(runs: Sequence[Metrics]) -> dict[str, Any]:
    """Summarise the runs from several seeds: one run's metrics, with a spread in place of each number.

    Args:
        runs: the metrics of each seed, for the same stream and settings.

    Returns:
        `{"metric": word, "task_adapter": {"average_accuracy": spread, "forgetting": ..., "backward_transfer": ...},
        "live_queue": {...}, "baselines": {name: {"average_accuracy": spread}}}`, where a spread is
        `{"mean", "std", "values"}`: `std` is the sample standard deviation, None for a single run; and the word is that
        of `measured`. Where every run has answers without the task's name, there is also
        `"class_incremental": {"adapters": {measure: spread}, "closed_form": {...}, "baselines": {name: {...}},
        "calibration": {"error": spread}, "unknown": {"false_alarm_rate", "false_alarms", "mean_auroc",
        "mean_detected"}}`, with None in place of a spread where a run has no number.

    Raises:
        ValueError: `runs` is empty.
    """
    if not runs:
        raise ValueError("runs must hold the metrics of at least one run, got none")
    summary: dict[str, Any] = {"metric": measured(runs[0])} | {
        evaluation: {measure: _spread([run[evaluation][measure] for run in runs]) for measure in MEASURES}
        for evaluation in EVALUATIONS
    }
    summary["baselines"] = {
        name: {"average_accuracy": _spread([run["baselines"][name]["average_accuracy"] for run in runs])}
        for name in runs[0].get("baselines", {})
    }
    if all(run.get("class_incremental") for run in runs):
        summary["class_incremental"] = _unnamed_spreads([run["class_incremental"] for run in runs])
    return summary


def _unnamed_spreads(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The block `class_incremental` of a summary, from those of the runs."""
    baselines = blocks[0].get("baselines", {})
    unknown = ("false_alarm_rate", "false_alarms", "mean_auroc", "mean_detected")
    return {
        **{name: _spreads([b[name] for b in blocks], UNNAMED_MEASURES) for name in unnamed_evaluations(blocks[0])},
        "baselines": {name: _spreads([b["baselines"][name] for b in blocks], UNNAMED_MEASURES) for name in baselines},
        "calibration": _spreads([b["calibration"] for b in blocks], ["error"]),
        "unknown": _spreads([b["unknown"] for b in blocks], unknown),
    }


def _spreads(results: Sequence[Mapping[str, Any]], measures: Iterable[str]) -> dict[str, dict[str, Any] | None]:
    """A spread for each measure that the results have; None where one of them has no number."""
    spreads: dict[str, dict[str, Any] | None] = {}
    for measure in filter(results[0].__contains__, measures):
        values: list[Any] = [result.get(measure) for result in results]
        spreads[measure] = None if None in values else _spread(values)
    return spreads


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "values": values}


START_ROWS = {"random": "random rows", "queue-mean": "the queue's mean", "prompt": "the prompt of a task"}
"""What the rows of a start are called."""


def start_in_words(start: Mapping[str, Any]) -> str:
    """Say where a task started, from the `start` of its entry in `per_task`."""
    chosen, tried = start["chosen"], len(start["considered"])
    said = START_ROWS[chosen["rows"]] if chosen["donor"] is None else f"the prompt of {chosen['donor']}"
    if chosen["head"] is not None:
        heads = {"random": "a random head", "probe": "the probe as its head", "closed-form": "a head in closed form"}
        said += f" with {heads[chosen['head']]}"
    if chosen["mixed_with"]:
        said += f", mixed with that of {' and '.join(chosen['mixed_with'])}"
    if tried > 1 and chosen["loss"] is not None:
        said += f" (loss {chosen['loss']:.3f}; {tried} were tried)"
    return said
