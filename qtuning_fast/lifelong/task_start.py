"""Start a task of a run: from what, by which examples, and what the record says of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtuning_fast.lifelong.class_incremental import first_of_each_class
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.probe import LinearProbe
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.method.adapter import PREVIOUS, RANDOM, VALIDATION
from qtuning_fast.method.config import HEAD_TASK_TYPES, QTuningConfig
from qtuning_fast.method.labels import SINGLE
from qtuning_fast.model.distributed import share_of
from qtuning_fast.model.model import QTuningModel

START_EXAMPLES, START_EXAMPLES_A_CLASS = 256, 8
"""The most examples of each split by which the start of a task is chosen; of many classes so many each."""


def check_start(config: QTuningConfig, options: TrainingOptions, names: Sequence[str]) -> None:
    """Raise a ValueError for settings under which what a task starts from would be wrong or missing.

    Args:
        config, options: the settings of a run.
        names: its tasks.
    """
    if options.starts_from not in (RANDOM, PREVIOUS, VALIDATION, *names):
        raise ValueError(
            f"start_from is {options.start_from!r}; it must be {RANDOM!r}, {PREVIOUS!r}, {VALIDATION!r} or one of the "
            f"tasks: {', '.join(names)}"
        )
    if options.head_start == "probe" and config.task_type not in HEAD_TASK_TYPES:
        raise ValueError(f"head_start is 'probe', but task_type={config.task_type!r} has no heads; leave it out")
    if options.prompt_momentum and not config.prompt_length:
        raise ValueError(f"prompt_momentum is {options.prompt_momentum}, but prompt_length is 0; leave it out")
    if options.prompt_momentum and config.reparameterization is not None:
        raise ValueError(
            f"prompt_momentum is {options.prompt_momentum}, which mixes prompts as they are trained, but "
            f"reparameterization is {config.reparameterization!r}; set it to None"
        )
    if not options.steps and config.prompt_length + config.shared_length:
        raise ValueError("steps is 0, so prompts would not be trained; train them, or set both their lengths to 0")


def start_task(
    model: QTuningModel,
    task: Task,
    options: TrainingOptions,
    train: EncodedExamples,
    validation: EncodedExamples,
    probe: LinearProbe | None,
) -> dict[str, Any]:
    """Start a task as the options say.

    Args:
        model: a model with no task in training.
        task: the task.
        options: of the run.
        train, validation: the encoded splits; the training split with the labels that are trained on.
        probe: what the head starts as, if it starts as the probe.

    Returns:
        `start`, as `ChosenStart.to_dict` has it, and `start_seconds`, for `training.json`.
    """
    start_from = options.starts_from
    if start_from not in (RANDOM, PREVIOUS, VALIDATION, *model.tasks):
        start_from = RANDOM  # the task of this name is yet to come
    chooses = start_from == VALIDATION or (options.head_start == "closed-form" and model.has_heads)
    began = time.perf_counter()
    start = model.start_task(
        task.name,
        label_names=task.label_names,
        problem_type=task.problem_type,
        start_from=start_from,
        examples=_some(model, task, train, options.eval_batch_size) if chooses else None,
        # A language model's validation split holds classes, not the answers that its loss is of.
        validation=_some(model, task, validation, options.eval_batch_size) if chooses and model.has_heads else None,
    ).to_dict()
    if probe is not None:
        model.learning.set_head(probe.head)
        for each in (start["chosen"], *start["considered"]):
            each["head"] = "probe"
    return {"start": start, "start_seconds": time.perf_counter() - began}


def mix_with_earlier_prompts(model: QTuningModel, share: float) -> None:
    """Mix the mean of all earlier tasks' own prompts into the prompt in training (HiDe-Prompt, arXiv 2310.07234)."""
    prefix = model.training_prefix
    earlier = [prefix.own_prompts(adapter) for adapter in model.adapters.values()]
    if earlier:
        means = [torch.stack(layer).mean(0) for layer in zip(*earlier)]
        mixed = [(1 - share) * mine + share * mean.to(mine) for mine, mean in zip(prefix.prompts(), means)]
        prefix.start_prompts(mixed)


def _some(model: QTuningModel, task: Task, examples: EncodedExamples, batch_size: int) -> list[dict[str, Tensor]]:
    """Return this process's part of the batches of some examples with their labels; all classes have a share."""
    places = np.arange(min(START_EXAMPLES, len(examples)))
    if task.problem_type == SINGLE and model.has_heads:
        each = max(START_EXAMPLES_A_CLASS, START_EXAMPLES // len(task.label_names))
        places = first_of_each_class(examples.columns["labels"].numpy(), each)
    some = examples.subset(places.tolist())
    numbers = range(some.batch_count(batch_size))[share_of(some.batch_count(batch_size))]
    return [some.labelled_batch(number, batch_size) for number in numbers]
