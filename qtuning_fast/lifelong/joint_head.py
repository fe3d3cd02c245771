"""The head over all classes of a run, which answers where no task is named: task-adaptive prediction (TAP).

After each task Gaussians are fitted to the features of its classes under its own adapter, and the head over all classes
so far trains on pseudo-features drawn from them (`qtuning_fast.method.task_adaptive`). An input is read under the
adapter of its inferred task; the head then chooses among the classes of all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtuning_fast.lifelong.class_incremental import Pairs
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.evaluation import features
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.method.class_gaussians import ClassGaussians
from qtuning_fast.method.closed_form import LinearHead
from qtuning_fast.method.config import HEAD_TASK_TYPES, QTuningConfig
from qtuning_fast.method.labels import SINGLE
from qtuning_fast.method.task_adaptive import Rebalancing, rebalanced
from qtuning_fast.model.model import QTuningModel

CENTROIDS = 10
_GAUSSIANS, _HEAD = "gaussians.safetensors", "joint_head.safetensors"


def check_joint_head(config: QTuningConfig, options: TrainingOptions, tasks: Sequence[Task]) -> None:
    """Raise a ValueError if a head over all classes, or its regulariser, does not suit the tasks."""
    asked = [name for name in ("joint_head", "contrast") if getattr(options, name)]
    for name in asked:
        if config.task_type not in HEAD_TASK_TYPES:
            raise ValueError(f"{name} is {getattr(options, name)!r}, but task_type={config.task_type!r} has no heads")
        for task in tasks:
            if task.problem_type != SINGLE:
                raise ValueError(
                    f"{name} is {getattr(options, name)!r}, which is for answers that are one class of several, but "
                    f"task {task.name!r} has problem_type={task.problem_type!r}"
                )


def instructed_features(
    model: QTuningModel, examples: EncodedExamples, tasks: Sequence[str], batch_size: int
) -> Tensor:
    """Return the features of each example under the adapter of its task, `[n, F]`."""
    x = torch.zeros(len(examples), model.hidden_size)
    for task in dict.fromkeys(tasks):
        chosen = [place for place, name in enumerate(tasks) if name == task]
        x[chosen] = features(model, examples.subset(chosen), batch_size, task=task)
    return x


def saved_joint_head(run: Path, tasks: int) -> LinearHead:
    """Return the head over all classes of a run after so many tasks.

    Raises:
        ValueError: the run has none.
    """
    found = sorted(run.glob(f"tasks/{tasks - 1:02d}-*/{_HEAD}"))
    if not found:
        raise ValueError(f"{run} has no head over all classes after {tasks} tasks; it is made with --joint-head")
    return LinearHead(**load_file(found[0]))


class JointHead:
    """The Gaussians and the head of a run, in files of its tasks.

    Args:
        tasks: the tasks of the run.
        encoded: returns the encoded splits of a task.
        options: of the run.
        folder_of: returns the folder of a task, by its number.
        seed_of: returns the seed of a task, by its number.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        encoded: Callable[[Task], Mapping[str, EncodedExamples]],
        options: TrainingOptions,
        folder_of: Callable[[int], Path],
        seed_of: Callable[[int], int],
    ) -> None:
        self._tasks = tasks
        self._encoded = encoded
        self._options = options
        self._folder_of, self._seed_of = folder_of, seed_of
        self._first = [0, *accumulate(len(task.label_names) for task in tasks)]
        self._read: dict[str, tuple[Tensor, Tensor]] = {}

    def learn(self, model: QTuningModel, number: int) -> None:
        """Fit Gaussians to a finished task's classes and, if there is to be one, re-balance the head; once."""
        options, task, seed = self._options, self._tasks[number], self._seed_of(number)
        path = self._folder_of(number) / _GAUSSIANS
        if not path.exists():
            train = self._encoded(task)["train"]
            x = features(model, train, options.eval_batch_size, task=task.name)
            kind = options.joint_head or "variance"
            clustered = partial(nearest_centroids, seed=seed) if kind == "centroids" else None
            _save(path, ClassGaussians.of(x, train.columns["labels"], kind, clustered=clustered).tensors())
        path = self._folder_of(number) / _HEAD
        if options.joint_head is None or path.exists():
            return
        adapter = model.adapters[task.name]
        assert adapter.head_weight is not None and adapter.head_bias is not None
        head = LinearHead(adapter.head_weight.double(), adapter.head_bias.double())
        if number:
            before = self._head(number - 1)
            head = LinearHead(torch.cat([before.weight, head.weight]), torch.cat([before.bias, head.bias]))
            how = Rebalancing(options.joint_epochs, options.joint_rate, 5 * options.batch_size)
            head = rebalanced(head, self._gaussians(number + 1), how, seed=seed)
        _save(path, {"weight": head.weight, "bias": head.bias})

    def class_means(self, number: int) -> Tensor:
        """Return the means of the classes of the tasks before one, `[K, F]`."""
        return self._gaussians(number).class_means() if number else torch.zeros(0, 0)

    def answers(self, model: QTuningModel, number: int, places: Sequence[Tensor]) -> list[Pairs]:
        """Return what the test examples of each task so far are taken for, after a task.

        Args:
            model: with the finished tasks.
            number: of the task learned last.
            places: the place of each example's inferred task, `[n]` a task.
        """
        head = self._head(number)
        table = torch.tensor(
            [(place, label) for place, task in enumerate(self._tasks[: number + 1]) for label in range(_size(task))]
        )
        return [
            table[head(self._instructed(model, task, inferred)).argmax(1)].numpy()
            for task, inferred in zip(self._tasks[: number + 1], places)
        ]

    def _instructed(self, model: QTuningModel, task: Task, places: Tensor) -> Tensor:
        """Return the features of a task's test examples, each under its inferred task's adapter.

        Adapters do not change, so an example is read anew only where another task is inferred than before.
        """
        test = self._encoded(task)["test"]
        before, x = self._read.get(
            task.name, (torch.full_like(places, -1), torch.zeros(len(places), model.hidden_size))
        )
        x = x.clone()
        for place in places[places != before].unique().tolist():
            chosen = ((places == place) & (before != place)).nonzero()[:, 0]
            name = self._tasks[place].name
            x[chosen] = features(model, test.subset(chosen.tolist()), self._options.eval_batch_size, task=name)
        self._read[task.name] = places, x
        return x

    def _gaussians(self, tasks: int) -> ClassGaussians:
        """Return those of the first tasks, by the numbers that their classes have among all."""
        parts = [ClassGaussians.from_tensors(load_file(self._folder_of(n) / _GAUSSIANS)) for n in range(tasks)]
        return ClassGaussians.joined(parts, self._first[:tasks])

    def _head(self, number: int) -> LinearHead:
        return LinearHead(**load_file(self._folder_of(number) / _HEAD))


def nearest_centroids(x: Tensor, seed: int) -> Tensor:
    """Return the number of the centroid of k-means that each example is nearest to; there are ten at most."""
    from sklearn.cluster import KMeans

    count = min(CENTROIDS, len(np.unique(x.numpy(), axis=0)))
    return torch.from_numpy(KMeans(count, n_init=1, random_state=seed).fit(x.numpy()).labels_)


def _size(task: Task) -> int:
    return len(task.label_names)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: x.contiguous() for name, x in tensors.items()}, partial)
    partial.replace(path)
