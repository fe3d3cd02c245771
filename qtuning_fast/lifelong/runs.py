"""A run on disk: begun from its settings, gone on with, and opened again to evaluate and predict."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.data.encoding import Answers, ExampleEncoder
from qtuning_fast.lifelong.evaluation import accuracy, probabilities
from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.metrics import mean_and_spread
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.lifelong.tasks import Examples, Task, data_digest
from qtuning_fast.lifelong.trainer import RUN_FILE, LifelongTrainer
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.model.checked_files import read_json, write_json
from qtuning_fast.model.model import QTuningModel

METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class RunSettings:
    """Everything that makes a run what it is."""

    model: str
    data: DataOptions
    method: QTuningConfig
    training: TrainingOptions
    forward_transfer: bool = False

    def with_seed(self, seed: int) -> RunSettings:
        """The same run from another seed, which also draws other examples."""
        return replace(self, data=replace(self.data, seed=seed), training=replace(self.training, seed=seed))


ListenerFactory = Callable[[Sequence[Task], str], AbstractContextManager[RunListener]]


def run_stream(settings: RunSettings, folder: Path, make_listener: ListenerFactory) -> dict[str, Any]:
    """Begin the run in `folder`, or go on with it; writes metrics and report.

    Args:
        settings: of the run.
        folder: a new one, or that of the same run cut off.
        make_listener: makes a listener for a list of tasks and a title.

    Returns:
        The metrics.
    """
    from qtuning_fast.lifelong.report.page import write_report  # draws: evaluating and predicting do without

    _check_writable(folder)
    tasks = settings.data.load()  # before the model: what is wrong with the data shows at once
    base_model, processor = load_base_model(settings.model, settings.method.task_type)
    title = settings.data.stream or "own data"
    with make_listener(tasks, title) as listener:
        metrics = LifelongTrainer(
            base_model,
            processor,
            settings.method,
            tasks,
            settings.training,
            folder,
            forward_transfer=settings.forward_transfer,
            about={
                "stream": title,
                "base_model": _with_absolute_path(settings.model),
                "data": _recorded(settings.data),
            },
            listener=listener,
        ).run()
    write_report(metrics, folder)
    return metrics


def run_seeds(settings: RunSettings, seeds: int, folder: Path, make_listener: ListenerFactory) -> dict[str, Any]:
    """The run from several seeds, each in a folder of its own below `folder`.

    Returns:
        Mean and spread over the seeds.
    """
    from qtuning_fast.lifelong.report.page import write_seeds_report

    if (folder / RUN_FILE).exists():
        raise ValueError(f"out is {str(folder)!r}, which holds a run from one seed; name another folder")
    first = settings.training.seed
    runs = [
        run_stream(settings.with_seed(seed), folder / f"seed-{seed}", make_listener)
        for seed in range(first, first + seeds)
    ]
    summary = mean_and_spread(runs)
    write_json(folder / "summary.json", summary)
    write_seeds_report(runs, summary, folder)
    return summary


def rewrite_report(folder: Path) -> tuple[Path, dict[str, Any], bool]:
    """`report.html` and its pictures again, from `metrics.json`; with several seeds, those of each seed as well.

    Returns:
        The page, the metrics or the summary that it shows, and whether it is a summary.
    """
    from qtuning_fast.lifelong.report.page import write_report, write_seeds_report

    if (folder / METRICS_FILE).is_file():
        metrics = read_json(folder / METRICS_FILE)
        return write_report(metrics, folder), metrics, False
    runs = [(read_json(path), path.parent) for path in _files_by_seed(folder, METRICS_FILE)]
    if not runs:
        raise FileNotFoundError(f"{folder} holds no {METRICS_FILE}: no run has ended there")
    for metrics, seed_folder in runs:
        write_report(metrics, seed_folder)
    every = [metrics for metrics, _ in runs]
    summary = mean_and_spread(every)
    return write_seeds_report(every, summary, folder), summary, True


class SavedRun:
    """A run's stored adapters, ready to evaluate and predict.

    Args:
        folder: of a run; of a run from several seeds the first seed is taken.

    Raises:
        FileNotFoundError: there is no run, or no task of it is finished.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _run_folder(folder)
        settings = read_json(self.folder / RUN_FILE)
        self.options = TrainingOptions(**settings["training"])
        self._about, self._digests = settings["about"], settings["tasks"]
        self._words = settings.get("label_words", {})
        if not {"base_model", "data"} <= self._about.keys():
            raise ValueError(
                f"{folder}: this run was begun from Python; open its adapters by QTuningModel.from_pretrained"
            )
        self.data = DataOptions(**{**self._about["data"], "tasks": tuple(self._about["data"]["tasks"])})
        task_type = settings["method"]["task_type"]
        base_model, processor = load_base_model(self._about["base_model"], task_type)
        self.encoder = ExampleEncoder(processor, task_type, self.options.max_length)
        self.model = QTuningModel.from_pretrained(base_model, self.folder / "adapter").eval()

    def load_tasks(self) -> list[Task]:
        """The run's tasks again, the finished ones.

        Raises:
            ValueError: a task's data is not what the run learned from.
        """
        tasks = self.data.load()[: len(self.model.tasks)]
        for task in tasks:
            if data_digest(task) != self._digests.get(task.name):
                raise ValueError(f"the data of task {task.name!r} has changed since the run; name it with --data")
        return tasks

    def predict(self, inputs: Sequence[str], task: str) -> Tensor:
        """Probabilities `[inputs, classes]` of texts, or of images by their paths, under a task's adapter.

        A language model chooses among the words for the classes.
        """
        self.model.set_task(task)
        given = [Path(each) if self.encoder.reads_images else each for each in inputs]
        encoded = self.encoder.encode(Examples(given, [0] * len(given)))
        return probabilities(self.model, encoded, self._batch_size, self._answers(task))

    def accuracy(self, examples: Examples, task: str) -> float:
        """Share of the examples that a task's adapter gets right.

        Raises:
            ValueError: they are images where the run reads texts, or the other way round.
        """
        if isinstance(examples.inputs[0], Path) != self.encoder.reads_images:
            kinds = ("images", "texts") if self.encoder.reads_images else ("texts", "images")
            raise ValueError(f"task {task!r} reads {kinds[0]}, but these examples are {kinds[1]}")
        self.model.set_task(task)
        return accuracy(self.model, self.encoder.encode(examples), self._batch_size, self._answers(task))

    @property
    def _batch_size(self) -> int:
        return self.options.eval_batch_size

    def _answers(self, task: str) -> Answers | None:
        return self.encoder.encode_answers(self._words.get(task, ()), task=task)


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, before anything is loaded; it is made only when the run begins."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"out is {str(folder)!r}, but {existing} is not a folder that can be written to")


def _run_folder(folder: Path) -> Path:
    seeds = _files_by_seed(folder, RUN_FILE)
    if not (folder / RUN_FILE).is_file() and not seeds:
        raise FileNotFoundError(f"{folder} holds no run")
    return folder if (folder / RUN_FILE).is_file() else seeds[0].parent


def _files_by_seed(folder: Path, file: str) -> list[Path]:
    found = [path for path in folder.glob(f"seed-*/{file}") if path.parent.name.removeprefix("seed-").isdigit()]
    return sorted(found, key=lambda path: int(path.parent.name.removeprefix("seed-")))


def _recorded(data: DataOptions) -> dict[str, Any]:
    return data.to_dict() | {"tasks": [_with_absolute_path(spec) for spec in data.tasks]}


def _with_absolute_path(spec: str) -> str:
    """A path, or `name=path`, that means the same from every folder; other names stay as they are."""
    if Path(spec).exists():  # it may hold an equals sign itself
        return str(Path(spec).absolute())
    name, _, path = spec.partition("=")
    return f"{name}={Path(path).absolute()}" if path and Path(path).exists() else spec
