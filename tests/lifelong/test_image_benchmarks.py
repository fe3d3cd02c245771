"""Benchmarks by name, on small stand-ins in the layout of the real ones: their tasks, their order, local copies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pictures

from qtuning_fast.lifelong import image_benchmarks
from qtuning_fast.lifelong.data.images import open_image
from qtuning_fast.lifelong.image_benchmarks import IMAGE_BENCHMARKS, ImageBenchmark
from qtuning_fast.lifelong.options import DataOptions
from qtuning_fast.lifelong.saved_run import SavedRun
from qtuning_fast.lifelong.streams import load_stream
from qtuning_fast.lifelong.tasks import data_digest

CLASSES = [f"class-{number}" for number in range(6)]
SIZES = {"train": 10, "test": 4}


def pictures(classes: int, each: int, seed: int) -> tuple[list[Any], list[int]]:
    """Different images of one colour a class."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for label in range(classes):
        for _ in range(each):
            pixels = rng.integers(0, 60, (4, 4, 3)) + np.array([30 * label, 200 - 30 * label, 90])
            images.append(Pictures.fromarray(pixels.clip(0, 255).astype(np.uint8)))
            labels.append(label)
    return images, labels


def stand_in(
    sizes: dict[str, int], image: str = "image", label: str = "label", classes: list[str] | None = None, **more: Any
) -> DatasetDict:
    names = CLASSES if classes is None else classes
    named = more.get("named", True)
    features = Features({image: Image(), label: ClassLabel(names=names) if named else Value("string")})
    splits = {}
    for seed, (split, each) in enumerate(sizes.items()):
        images, labels = pictures(len(names), each, seed + more.get("seed", 0))
        found = labels if named else [names[each] for each in labels]
        splits[split] = Dataset.from_dict({image: images, label: found}, features=features)
    return DatasetDict(splits)


def three_tasks(name: str) -> ImageBenchmark:
    real = IMAGE_BENCHMARKS[name]
    return ImageBenchmark(real.description, real.datasets, tasks=3, validation_shots=2)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    stand_in(SIZES, image="img", label="fine_label").save_to_disk(str(tmp_path / "cifar"))
    return tmp_path / "cifar"


def test_classes_are_dealt_to_tasks_in_an_order_by_seed(cifar: Path) -> None:
    tasks = three_tasks("split-cifar100").load(data=str(cifar))
    assert [task.name for task in tasks] == ["cifar100-01", "cifar100-02", "cifar100-03"]
    dealt = [name for task in tasks for name in task.label_names]
    assert sorted(dealt) == CLASSES and dealt != CLASSES
    for task in tasks:
        assert Counter(task.train.labels) == {0: 8, 1: 8} and Counter(task.validation.labels) == {0: 2, 1: 2}
        assert Counter(task.test.labels) == {0: 4, 1: 4} and task.holds_images
        for image, label in zip(task.test.inputs, task.test.labels):
            number = CLASSES.index(task.label_names[label])
            red = np.asarray(open_image(image))[..., 0].mean()
            assert abs(red - 30 * number - 30) < 15, (number, red)
    again, other = (three_tasks("split-cifar100").load(data=str(cifar), seed=seed) for seed in (0, 1))
    assert again == tasks and [task.label_names for task in other] != [task.label_names for task in tasks]
    assert [data_digest(task) for task in again] == [data_digest(task) for task in tasks]


def test_sizes_may_be_given(cifar: Path) -> None:
    tasks = three_tasks("split-cifar100").load(data=str(cifar), shots=3, validation_shots=1, test_size=2)
    assert [len(part) for part in (tasks[0].train, tasks[0].validation, tasks[0].test)] == [6, 2, 2]


def test_a_single_split_is_cut(tmp_path: Path) -> None:
    """ImageNet-R has a split test alone on the hub; its classes are names."""
    data = stand_in({"test": 10}, label="wnid", named=False)
    data.save_to_disk(str(tmp_path / "whole"))
    data["test"].save_to_disk(str(tmp_path / "split"))
    for place, row in enumerate(data["test"]):
        folder = tmp_path / "folders" / row["wnid"]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{place:03d}.png")
    tested = []
    for kind, seed in (("whole", 0), ("whole", 1), ("split", 0), ("folders", 0), ("folders", 1)):
        tasks = three_tasks("split-imagenet-r").load(data=str(tmp_path / kind), seed=seed)
        for task in tasks:
            parts = [Counter(part.labels) for part in (task.train, task.validation, task.test)]
            assert parts == [{0: 7, 1: 7}, {0: 1, 1: 1}, {0: 2, 1: 2}]  # a fifth of a class tests
        tested.append({np.asarray(open_image(each)).tobytes() for task in tasks for each in task.test.inputs})
    assert tested[0] == tested[1] == tested[2] and tested[3] == tested[4]  # the same images for every seed


def test_files_of_the_hub_and_folders_of_images(tmp_path: Path) -> None:
    data = stand_in(SIZES)
    (tmp_path / "files" / "data").mkdir(parents=True)
    for split, each in data.items():
        each.to_parquet(str(tmp_path / "files" / "data" / f"{split}-00000-of-00001.parquet"))
        for place, row in enumerate(each):
            folder = tmp_path / "folders" / split / CLASSES[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{place:03d}.png")
    files, folders = (three_tasks("split-cub200").load(data=str(tmp_path / kind)) for kind in ("files", "folders"))
    for one, other in zip(files, folders):
        assert one.label_names == other.label_names and len(one.train) == len(other.train) == 16
        pixels = [sorted(np.asarray(open_image(each)).tobytes() for each in task.test.inputs) for task in (one, other)]
        assert pixels[0] == pixels[1]


def test_five_datasets_are_a_task_each(tmp_path: Path) -> None:
    for seed, dataset in enumerate(IMAGE_BENCHMARKS["five-datasets"].datasets):
        sizes = {"train": 10} if dataset.name == "notmnist" else {**SIZES, "extra": 1}
        with_extra = stand_in(sizes, image=dataset.image, label=dataset.label, seed=10 * seed)
        with_extra.save_to_disk(str(tmp_path / dataset.name))
    with pytest.warns(UserWarning, match="not used: extra"):
        tasks = load_stream("five-datasets", data=str(tmp_path), validation_shots=1)
    assert [task.name for task in tasks] == ["svhn", "mnist", "cifar10", "notmnist", "fashion-mnist"]
    assert all(task.label_names == CLASSES for task in tasks)
    assert {len(task.test) for task in tasks} == {24, 12}


def test_what_is_refused(cifar: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing, which should hold a copy of uoft-cs/cifar100"):
        load_stream("split-cifar100", data=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"train of .*cifar has no column 'image', only img, fine_label"):
        load_stream("split-cub200", data=str(cifar))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty cannot be loaded as a data set"):
        load_stream("split-cub200", data=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"stream_data is 'x', but this stream has data of its own"):
        load_stream("offline-5", data="x")
    with pytest.raises(ValueError, match=r"stream_data is 'x', but there is no stream"):
        DataOptions(tasks=("a.csv",), stream_data="x").load()


def test_the_hub_is_asked_by_name(monkeypatch: pytest.MonkeyPatch, cifar: Path) -> None:
    asked: list[str] = []

    def load_hub(path: str) -> dict[str, Dataset]:
        asked.append(path)
        return dict(stand_in(SIZES, image="img", label="fine_label"))

    monkeypatch.setattr(image_benchmarks, "load_hub", load_hub)
    assert three_tasks("split-cifar100").load()[0].source == "uoft-cs/cifar100" and asked == ["uoft-cs/cifar100"]
    real = IMAGE_BENCHMARKS["split-cifar100"]
    assert real.tasks == 10 and real.shots is None and DataOptions(stream="split-cifar100").stream_data is None


# By the command line


def test_norga_on_split_cifar100_ends_the_same_after_kill_9(folders_of_models: dict[str, Path], tmp_path: Path) -> None:
    classes = [f"class-{number:02d}" for number in range(30)]  # three for each of ten tasks
    data = stand_in({"train": 6, "test": 2}, image="img", label="fine_label", classes=classes)
    data.save_to_disk(str(tmp_path / "cifar"))
    command = [
        sys.executable,
        *("-c", "from qtuning_fast.cli import main; main()", "run", "--stream=split-cifar100", "--method=norga"),
        f"--stream-data={tmp_path / 'cifar'}",
        f"--model={folders_of_models['image-classification']}",
        *("--layers=0,1", "--prompt-length=3", "--epochs=1", "--batch-size=8", "--eval-every=2"),
        *("--validation-shots=1", "--joint-epochs=2"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, f"--out={killed}"], env=environment, start_new_session=True)
    while process.poll() is None and not list(killed.glob("tasks/03-*/training.json")):
        time.sleep(0.05)
    assert process.poll() is None, "it ended before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    outputs = [
        subprocess.run(
            [*command, f"--out={folder}"], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for folder in (killed, tmp_path / "whole")
    ]
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (killed, tmp_path / "whole")]
    for name in ("class_incremental", "task_adapter", "live_queue"):
        assert metrics[0][name] == metrics[1][name]
    joint = metrics[0]["class_incremental"]["joint_head"]
    assert len(joint["accuracy_matrix"]) == 10 and metrics[0]["config"]["answered_by"] == "joint_head"
    saved = SavedRun(killed)
    assert saved.answers_by == "joint-head"
    found = [saved.score_unnamed(each.test, each.name)["accuracy"] for each in saved.load_tasks()]
    assert found == pytest.approx(joint["accuracy_matrix"][-1])
    own = SavedRun(killed, answers_by="adapters")
    adapters = metrics[0]["class_incremental"]["adapters"]["accuracy_matrix"][-1]
    assert [own.score_unnamed(each.test, each.name)["accuracy"] for each in own.load_tasks()] == pytest.approx(adapters)
    table = outputs[0].partition("task is not named")[2]
    for word in ("(FA)", "(CA)", "forgetting", "joint head", f"{joint['average_accuracy']:.3f}"):
        assert word in table, outputs[0]
