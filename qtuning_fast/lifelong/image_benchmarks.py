"""The benchmarks of class-incremental learning by name: the classes of image data sets, dealt to tasks.

The data come from the Hugging Face hub, or from a local copy: the files of the hub's data set, what `save_to_disk` of
the package datasets wrote, or a folder with a folder of images for each class (or folders train and test of such).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qtuning_fast.lifelong.data.hub import load_hub, load_local_copy
from qtuning_fast.lifelong.data.image_folders import check_images, is_image_folder, read_image_folder
from qtuning_fast.lifelong.stream import AnyStream
from qtuning_fast.lifelong.tasks import SPLITS, Labelled, PackedImage, Task, few_shot_split

if TYPE_CHECKING:
    from datasets import Dataset

EVERY = 10**9
"""More test examples than any set has."""


@dataclass(frozen=True)
class ImageDataset:
    """An image data set and where its images and labels are.

    Attributes:
        name: what its tasks are called.
        hub: its name on the hub, with `:config` if it has several.
        image, label: the names of its columns.
    """

    name: str
    hub: str
    image: str = "image"
    label: str = "label"

    def read(self, folder: Path | None) -> tuple[dict[str, Labelled], list[str]]:
        """Read each split with the names of its classes, and all class names in order; None reads the hub.

        Without a test split it is a fifth of each class, the same for every seed.

        Raises:
            ImportError, ConnectionError, ValueError: the data are not there or cannot be read.
        """
        if folder is not None and is_image_folder(folder):
            splits, classes = read_image_folder(str(folder))
        else:
            splits, classes = self._read_columns(folder)
        if "test" not in splits:
            splits["train"], splits["test"] = _fifth_of_each_class(splits["train"])
        return splits, classes

    def _read_columns(self, folder: Path | None) -> tuple[dict[str, Labelled], list[str]]:
        """Read a data set with a column of images."""
        loaded = load_hub(self.hub) if folder is None else load_local_copy(folder, self.hub.partition(":")[2] or None)
        where = self.hub if folder is None else str(folder)
        if len(loaded) == 1:
            loaded = {"train": next(iter(loaded.values()))}
        if "train" not in loaded:
            raise ValueError(f"{where} has no split 'train', only {', '.join(loaded)}")
        splits = {split: self._labelled(data, f"{split} of {where}") for split, data in loaded.items()}
        return splits, self._classes(loaded["train"], splits["train"])

    def _labelled(self, data: Dataset, where: str) -> Labelled:
        from datasets import ClassLabel, Image

        for column in (self.image, self.label):
            if column not in data.features:
                raise ValueError(f"{where} has no column {column!r}, only {', '.join(data.features)}")
        feature = data.features[self.label]
        labels = [
            feature.int2str(label) if isinstance(feature, ClassLabel) else str(label) for label in data[self.label][:]
        ]
        encoded = data.cast_column(self.image, Image(decode=False))

        def read(place: int) -> bytes:
            found = encoded[place][self.image]
            return found["bytes"] if found["bytes"] is not None else Path(found["path"]).read_bytes()

        return [PackedImage(where, place, read) for place in range(len(data))], labels

    def _classes(self, data: Dataset, train: Labelled) -> list[str]:
        from datasets import ClassLabel

        feature = data.features[self.label]
        present = {str(label) for label in train[1]}
        names = feature.names if isinstance(feature, ClassLabel) else sorted(present)
        return [name for name in names if name in present]


@dataclass(frozen=True)
class ImageBenchmark(AnyStream):
    """A stream of the classes of data sets.

    Attributes:
        datasets: in the order of learning.
        tasks: the number of tasks of each data set. Its classes are dealt to them in an order that the seed draws; a
            single task has them in their own order.
    """

    description: str
    datasets: tuple[ImageDataset, ...]
    tasks: int = 10
    queue_size: int = 5
    shots: int | None = None
    validation_shots: int = 16
    test_size: int = EVERY
    task_type: str = "image-classification"

    def _draw(self, *, seed: int, data: str | None, **sizes: Any) -> list[Task]:
        tasks: list[Task] = []
        for dataset in self.datasets:
            splits, classes = dataset.read(self._folder(dataset, data))
            for number, names in enumerate(self._dealt(classes, seed), start=1):
                of_task = {split: _of_classes(each, names) for split, each in splits.items()}
                tasks.append(
                    few_shot_split(
                        *of_task["train"],
                        name=dataset.name if self.tasks == 1 else f"{dataset.name}-{number:02d}",
                        **sizes,
                        seed=seed,
                        label_names=names,
                        validation=of_task.get("validation"),
                        test=of_task["test"],
                        source=dataset.hub if data is None else data,
                    )
                )
        if data is not None:  # a copy may have been cut short
            check_images([each for task in tasks for part in SPLITS for each in getattr(task, part).inputs])
        return tasks

    def _folder(self, dataset: ImageDataset, data: str | None) -> Path | None:
        if data is None:
            return None
        folder = Path(data).expanduser() / (dataset.name if len(self.datasets) > 1 else "")
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}, which should hold a copy of {dataset.hub}")
        return folder

    def _dealt(self, classes: list[str], seed: int) -> list[list[str]]:
        """Return the classes of each task."""
        if self.tasks == 1:
            return [classes]
        order = [classes[place] for place in np.random.default_rng(seed).permutation(len(classes))]
        return [part.tolist() for part in np.array_split(np.array(order, dtype=object), self.tasks)]


def _fifth_of_each_class(labelled: Labelled) -> tuple[Labelled, Labelled]:
    """Return the training and the test part of a data set without splits."""
    inputs, labels = labelled
    draws, test = np.random.default_rng(0), np.zeros(len(labels), dtype=bool)
    for name in sorted({str(label) for label in labels}):
        places = draws.permutation([place for place, label in enumerate(labels) if label == name])
        test[places[: len(places) // 5]] = True
    parts = [[place for place in range(len(labels)) if test[place] == is_test] for is_test in (False, True)]
    train, tested = (([inputs[n] for n in part], [labels[n] for n in part]) for part in parts)
    return train, tested


def _of_classes(labelled: Labelled, names: list[str]) -> Labelled:
    """The images of some classes."""
    inputs, labels = labelled
    wanted = set(names)
    chosen = [place for place, label in enumerate(labels) if label in wanted]
    return [inputs[place] for place in chosen], [labels[place] for place in chosen]


_FIVE = (
    ImageDataset("svhn", "ufldl-stanford/svhn:cropped_digits"),
    ImageDataset("mnist", "ylecun/mnist"),
    ImageDataset("cifar10", "uoft-cs/cifar10", image="img"),
    ImageDataset("notmnist", "anubhavmaity/notMNIST"),
    ImageDataset("fashion-mnist", "zalando-datasets/fashion_mnist"),
)

IMAGE_BENCHMARKS = {
    "split-cifar100": ImageBenchmark(
        "100 classes of small photographs in ten tasks",
        (ImageDataset("cifar100", "uoft-cs/cifar100", image="img", label="fine_label"),),
    ),
    # The hub has one split of it, of which a fifth of each class tests.
    "split-imagenet-r": ImageBenchmark(
        "200 classes of renditions (paintings, toys, sketches) in ten tasks",
        (ImageDataset("imagenet-r", "axiong/imagenet-r", label="wnid"),),
    ),
    "split-cub200": ImageBenchmark(
        "200 kinds of birds in ten tasks", (ImageDataset("cub200", "bentrevett/caltech-ucsd-birds-200-2011"),)
    ),
    "five-datasets": ImageBenchmark(
        "house numbers, digits, photographs, letters and clothes, a task each", _FIVE, tasks=1
    ),
}
