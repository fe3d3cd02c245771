"""Start or resume a run from its settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.methods import Q_TUNING, method_by_name
from qtuning_fast.lifelong.metrics import mean_and_spread
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.lifelong.run_folder import RUN_FILE
from qtuning_fast.lifelong.saved_run import files_by_seed
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.lifelong.trainer import LifelongTrainer
from qtuning_fast.method.config import HEAD_TASK_TYPES, QTuningConfig
from qtuning_fast.method.task_rules import ClosedForm, rule_by_name
from qtuning_fast.model.checked_files import read_json, write_json
from qtuning_fast.model.distributed import from_first, process_number

METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class RunSettings:
    """All settings of a run."""

    model: str
    data: DataOptions
    method: QTuningConfig
    training: TrainingOptions
    forward_transfer: bool = False
    task_rule: str = ClosedForm.name
    keep_validation_features: bool = True
    method_name: str = Q_TUNING  # what `method` and `training` were made from

    def __post_init__(self) -> None:
        rule_by_name(self.task_rule)  # a wrong name fails before anything is loaded
        method_by_name(self.method_name)
        if self.method.task_type in HEAD_TASK_TYPES:
            self._check_words()

    def _check_words(self) -> None:
        """Raise a ValueError for settings that only language models read."""
        for name, value in (
            ("templates", list(self.data.templates)),
            ("label_words", list(self.data.label_words)),
            ("chat", self.training.chat),
        ):
            if value:
                raise ValueError(
                    f"{name} is {value!r}, which language models read, but task_type is {self.method.task_type!r}; "
                    "leave it out, or set task_type to causal-lm or text-to-text"
                )

    @property
    def method_in_words(self) -> str:
        """The method's name, with what was changed about it."""
        changed = method_by_name(self.method_name).changed(self.method, self.training)
        return ", ".join([self.method_name, *(f"{name}={value}" for name, value in changed.items())])

    def with_seed(self, seed: int) -> RunSettings:
        """The same run with another seed, which also draws other examples."""
        return replace(self, data=replace(self.data, seed=seed), training=replace(self.training, seed=seed))


ListenerFactory = Callable[[Sequence[Task], str], AbstractContextManager[RunListener]]


def run_stream(settings: RunSettings, folder: Path, make_listener: ListenerFactory) -> dict[str, Any]:
    """Start the run in `folder`, or resume it; write its metrics and its report.

    Args:
        settings: the settings of the run.
        folder: a new folder, or that of the same run after an interruption.
        make_listener: makes a listener from the tasks and a title.

    Returns:
        The metrics.
    """
    from qtuning_fast.lifelong.report.page import write_report  # imports matplotlib
    from qtuning_fast.lifelong.report.samples import write_samples

    from_first(lambda: _check_writable(folder))
    tasks = settings.data.load()  # before the model, so that errors in the data come at once
    base_model, processor = load_base_model(settings.model, settings.method.task_type)
    title = settings.data.stream or "own data"
    with make_listener(tasks, title) if process_number() == 0 else nullcontext(RunListener()) as listener:
        metrics = LifelongTrainer(
            base_model,
            processor,
            settings.method,
            tasks,
            settings.training,
            folder,
            forward_transfer=settings.forward_transfer,
            task_rule=settings.task_rule,
            keep_validation_features=settings.keep_validation_features,
            about={
                "stream": title,
                "base_model": _with_absolute_path(settings.model),
                "data": _recorded(settings.data),
                **({} if settings.method_name == Q_TUNING else _about_the_method(settings)),
            },
            listener=listener,
        ).run()
    if process_number() == 0:
        write_samples(tasks, folder)
        write_report(metrics, folder)
    return metrics


def run_seeds(settings: RunSettings, seeds: int, folder: Path, make_listener: ListenerFactory) -> dict[str, Any]:
    """Run from several seeds, each in its own folder below `folder`.

    Returns:
        Mean and spread over the seeds.

    Raises:
        ValueError: `folder` holds a run from one seed.
    """
    from qtuning_fast.lifelong.report.page import write_seeds_report

    if from_first((folder / RUN_FILE).exists):
        raise ValueError(f"out is {str(folder)!r}, which holds a run from one seed; choose another folder")
    first = settings.training.seed
    runs = [
        run_stream(settings.with_seed(seed), folder / f"seed-{seed}", make_listener)
        for seed in range(first, first + seeds)
    ]
    summary = mean_and_spread(runs)
    if process_number() == 0:
        write_json(folder / "summary.json", summary)
        write_seeds_report(runs, summary, folder)
    return summary


def rewrite_report(folder: Path) -> tuple[Path, dict[str, Any], bool]:
    """Write `report.html` and its pictures again from `metrics.json`; with several seeds, also those of each seed.

    Returns:
        The page, the metrics or the summary that it shows, and whether it is a summary.

    Raises:
        FileNotFoundError: no run has finished in `folder`.
    """
    from qtuning_fast.lifelong.report.page import write_report, write_seeds_report

    if (folder / METRICS_FILE).is_file():
        metrics = read_json(folder / METRICS_FILE)
        return write_report(metrics, folder), metrics, False
    runs = [(read_json(path), path.parent) for path in files_by_seed(folder, METRICS_FILE)]
    if not runs:
        raise FileNotFoundError(f"{folder} holds no {METRICS_FILE}: no run has finished there")
    for metrics, seed_folder in runs:
        write_report(metrics, seed_folder)
    every = [metrics for metrics, _ in runs]
    summary = mean_and_spread(every)
    return write_seeds_report(every, summary, folder), summary, True


def _about_the_method(settings: RunSettings) -> dict[str, str]:
    """The method's name, and what answers if no task is named, unless a setting takes that away."""
    method = method_by_name(settings.method_name)
    answers = method.answers
    if answers == "joint_head" and settings.training.joint_head is None:
        answers = "adapters"
    if method.rule not in (None, settings.task_rule):
        answers = "adapters"
    more = {} if answers == "adapters" else {"answered_by": answers}
    return {"method_name": settings.method_in_words, **more}


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, before anything is loaded. It is made only when the run starts."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"out is {str(folder)!r}, but {existing} is not a writable folder")


def _recorded(data: DataOptions) -> dict[str, Any]:
    """The options as JSON has them, with absolute paths."""
    copy = {} if data.stream_data is None else {"stream_data": str(Path(data.stream_data).expanduser().absolute())}
    return data.to_dict() | {"tasks": [_with_absolute_path(spec) for spec in data.tasks]} | copy


def _with_absolute_path(spec: str) -> str:
    """The spec with an absolute path, so that it is valid from every folder; other specs stay as they are."""
    if Path(spec).exists():  # a path may contain an equals sign
        return str(Path(spec).absolute())
    name, _, path = spec.partition("=")
    return f"{name}={Path(path).absolute()}" if path and Path(path).exists() else spec
