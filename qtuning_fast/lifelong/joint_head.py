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
from qtuning_fast.model.checked_files import CorruptFileError, read_json, read_tensors, write_json, write_tensors
from qtuning_fast.model.model import QTuningModel

CENTROIDS = 10
MOST_HEAD_BYTES = 1 << 30
FILE = "joint_head.json"
"""Names the files of a task's Gaussians and of the head after it, in the folder of the task."""

_GAUSSIANS, _HEAD, _FEATURES = "gaussians", "head", "instructed_features"


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


def joint_head_file(run: Path, tasks: int) -> tuple[Path, dict[str, str]] | None:
    """Return where the head over all classes of a run after so many tasks is, for `read_joint_head`; None: nowhere."""
    files = sorted(run.glob(f"tasks/{tasks - 1:02d}-*/{FILE}"))
    entries = read_json(files[0]) if files else {}
    return (files[0].parent, entries[_HEAD]) if _HEAD in entries else None


def read_joint_head(folder: Path, entry: Mapping[str, str], *, classes: int, features: int | None = None) -> LinearHead:
    """Return a head over so many classes, for so many features; None: of any number.

    Raises:
        CorruptFileError: the file is missing or damaged, or holds something else.
    """
    tensors = read_tensors(folder, entry, most_bytes=MOST_HEAD_BYTES)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    right = tensors.keys() == {"weight", "bias"} and weight is not None and bias is not None
    if not right or weight is None or bias is None or weight.ndim != 2 or len(weight) != classes != 0:
        raise CorruptFileError(f"{folder / entry['file']} does not hold a head over {classes} classes")
    if bias.shape != (classes,) or not all(x.is_floating_point() and x.isfinite().all() for x in (weight, bias)):
        raise CorruptFileError(f"{folder / entry['file']} does not hold a head over {classes} classes")
    if features is not None and weight.shape[1] != features:
        raise CorruptFileError(
            f"{folder / entry['file']} holds a head for {weight.shape[1]} features, but the model has {features}"
        )
    return LinearHead(weight, bias)


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

    def learn(self, model: QTuningModel, number: int) -> None:
        """Fit Gaussians to a finished task's classes and, if there is to be one, re-balance the head; once."""
        options, task, seed, folder = self._options, self._tasks[number], self._seed_of(number), self._folder_of(number)
        if (folder / FILE).exists():
            return
        train = self._encoded(task)["train"]
        x = features(model, train, options.eval_batch_size, task=task.name)
        kind = options.joint_head or "variance"
        clustered = partial(nearest_centroids, seed=seed) if kind == "centroids" else None
        gaussians = ClassGaussians.of(x, train.columns["labels"], kind, clustered=clustered)
        files = {_GAUSSIANS: write_tensors(folder, _GAUSSIANS, gaussians.tensors())}
        if options.joint_head is not None:
            head = self._rebalanced(model, number, gaussians)
            files[_HEAD] = write_tensors(folder, _HEAD, {"weight": head.weight, "bias": head.bias})
        write_json(folder / FILE, files)

    def _rebalanced(self, model: QTuningModel, number: int, gaussians: ClassGaussians) -> LinearHead:
        """Return the head after a task, given the Gaussians of its classes."""
        options, task, seed = self._options, self._tasks[number], self._seed_of(number)
        adapter = model.adapters[task.name]
        assert adapter.head_weight is not None and adapter.head_bias is not None
        head = LinearHead(adapter.head_weight.double(), adapter.head_bias.double())
        if number:
            before = _head_in(self._folder_of(number - 1))
            head = LinearHead(torch.cat([before.weight, head.weight]), torch.cat([before.bias, head.bias]))
            how = Rebalancing(options.joint_epochs, options.joint_rate, 5 * options.batch_size)
            earlier = self._gaussians(number)
            head = rebalanced(
                head, ClassGaussians.joined([earlier, gaussians], [0, self._first[number]]), how, seed=seed
            )
        return head

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
        head = _head_in(self._folder_of(number))
        table = torch.tensor(
            [
                (place, label)
                for place, task in enumerate(self._tasks[: number + 1])
                for label in range(len(task.label_names))
            ]
        )
        return [
            table[head(self._instructed(model, place, inferred)).argmax(1)].numpy()
            for place, inferred in enumerate(places)
        ]

    def _instructed(self, model: QTuningModel, number: int, places: Tensor) -> Tensor:
        """Return the features of a task's test examples, each under its inferred task's adapter.

        Adapters do not change, so an example is read anew only where another task is inferred than before. What was
        read is in a file: sums may depend on what shares a batch, and a resumed run shall end in the same bits.
        """
        task, file = self._tasks[number], self._folder_of(number) / f"{_FEATURES}.json"
        before, x = torch.full_like(places, -1), torch.zeros(len(places), model.hidden_size)
        if file.exists():
            kept = read_tensors(file.parent, read_json(file))
            before, x = kept["places"], kept["features"]
        anew = (places != before).nonzero()[:, 0].tolist()
        names = [self._tasks[int(places[each])].name for each in anew]
        test = self._encoded(task)["test"].subset(anew)
        x[anew] = instructed_features(model, test, names, self._options.eval_batch_size)
        entry = write_tensors(file.parent, _FEATURES, {"places": places, "features": x})
        write_json(file, entry)
        for old in file.parent.glob(f"{_FEATURES}-*.safetensors"):
            if old.name != entry["file"]:
                old.unlink()
        return x

    def _gaussians(self, tasks: int) -> ClassGaussians:
        """Return those of the first tasks, by the numbers that their classes have among all."""
        parts = [ClassGaussians.from_tensors(_tensors_in(self._folder_of(n), _GAUSSIANS)) for n in range(tasks)]
        return ClassGaussians.joined(parts, self._first[:tasks])


def nearest_centroids(x: Tensor, seed: int) -> Tensor:
    """Return the number of the centroid of k-means that each example is nearest to; there are ten at most."""
    from sklearn.cluster import KMeans

    count = min(CENTROIDS, len(np.unique(x.numpy(), axis=0)))
    return torch.from_numpy(KMeans(count, n_init=1, random_state=seed).fit(x.numpy()).labels_)


def _head_in(folder: Path) -> LinearHead:
    return LinearHead(**_tensors_in(folder, _HEAD))


def _tensors_in(folder: Path, name: str) -> dict[str, Tensor]:
    entry: dict[str, str] = read_json(folder / FILE)[name]
    return read_tensors(folder, entry)
