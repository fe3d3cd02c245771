"""A user's own images: layouts of folders, duplicates, and everything that can be wrong with them."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtuning_fast.lifelong.data.loading import load_examples, load_task
from qtuning_fast.lifelong.data.tables import DataWarning
from qtuning_fast.lifelong.tasks import data_digest
from qtuning_fast.model.checked_files import file_digest


def draw(folder: Path, count: int, seed: int = 0, ending: str = ".png") -> None:
    """So many different images."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{number}{ending}")


def classes_of(examples, names):
    return all(path.parent.name == names[label] for path, label in zip(examples.inputs, examples.labels))


def test_one_folder_is_split_like_texts(tmp_path):
    draw(tmp_path / "pets" / "dog", 30, seed=0)
    draw(tmp_path / "pets" / "cat", 20, seed=1, ending=".JPG")
    (tmp_path / "pets" / ".hidden").mkdir()
    (tmp_path / "pets" / "cat" / "notes.txt").touch()
    task = load_task(str(tmp_path / "pets"), shots=5, validation_shots=3, test_size=10)
    assert task.name == "pets" and task.label_names == ["cat", "dog"] and task.holds_images
    assert Counter(task.train.labels) == {0: 5, 1: 5} and Counter(task.validation.labels) == {0: 3, 1: 3}
    assert len(task.test) == 10
    parts = (task.train, task.validation, task.test)
    assert all(classes_of(part, task.label_names) for part in parts)
    assert len({path for part in parts for path in part.inputs}) == 26
    more = load_task(str(tmp_path / "pets"), shots=8, validation_shots=3, test_size=10)
    assert set(task.train.inputs) < set(more.train.inputs) and task.validation == more.validation


def test_folders_with_their_own_splits(tmp_path):
    for seed, split in enumerate(("train", "validation", "test")):
        for number, label in enumerate(("cat", "dog")):
            draw(tmp_path / split / label, 12, seed=10 * seed + number)
    task = load_task(f"pets={tmp_path}", validation_shots=4, test_size=6)
    for split, size in (("train", 24), ("validation", 8), ("test", 6)):
        examples = getattr(task, split)
        assert len(examples) == size and all(path.parts[-3] == split for path in examples.inputs)
    shutil.rmtree(tmp_path / "validation")
    assert len(load_task(f"pets={tmp_path}", validation_shots=2, test_size=6).train) == 20


def test_splits_go_by_the_names_that_people_use(tmp_path):
    for seed, split in enumerate(("Train", "Val", "TEST")):
        for number, label in enumerate(("cat", "dog")):
            draw(tmp_path / split / label, 12, seed=10 * seed + number)
    task = load_task(f"pets={tmp_path}", validation_shots=4, test_size=6)
    for split, folder, size in (("train", "Train", 24), ("validation", "Val", 8), ("test", "TEST", 6)):
        examples = getattr(task, split)
        assert len(examples) == size and all(path.parts[-3] == folder for path in examples.inputs)
    draw(tmp_path / "dev" / "cat", 2, seed=40)
    with pytest.raises(ValueError, match="several files for validation: Val, dev"):
        load_task(f"pets={tmp_path}")


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    for number, label in enumerate(("train", "bus")):
        draw(tmp_path / label, 12, seed=number)
    task = load_task(f"vehicles={tmp_path}", validation_shots=2)
    assert task.label_names == ["bus", "train"] and len(task.train) == 16


def test_what_is_no_image_is_named(tmp_path):
    for number, label in enumerate(("cat", "dog")):
        draw(tmp_path / label, 12, seed=number)
    draw(tmp_path / "cat" / "more", 3, seed=2)
    for name in ("labels.csv", "cat/10.gif", "dog/.hidden"):
        (tmp_path / name).touch()
    with pytest.warns(DataWarning, match=rf"^{tmp_path}: not used: labels.csv, cat/10.gif, cat/more$"):
        load_task(f"pets={tmp_path}", validation_shots=2)


def test_files_of_one_content_are_one(tmp_path):
    draw(tmp_path / "cat", 12, seed=0)
    draw(tmp_path / "dog", 12, seed=1)
    shutil.copy(tmp_path / "cat" / "3.png", tmp_path / "cat" / "again.png")
    shutil.copy(tmp_path / "cat" / "4.png", tmp_path / "dog" / "cat.png")  # under two labels: dropped
    task = load_task(f"pets={tmp_path}", validation_shots=2)
    drawn = [path for part in (task.train, task.validation, task.test) for path in part.inputs]
    contents = [file_digest(path) for path in drawn]
    assert len(drawn) == 23 == len(set(contents))
    assert file_digest(tmp_path / "cat" / "4.png") not in contents


def test_the_draw_and_the_digest_go_by_content(tmp_path):
    draw(tmp_path / "a" / "cat", 12, seed=0)
    draw(tmp_path / "a" / "dog", 12, seed=1)
    task = load_task(f"pets={tmp_path / 'a'}", shots=4, validation_shots=2)
    digest = data_digest(task)
    shutil.move(tmp_path / "a", tmp_path / "b")
    for number, path in enumerate(sorted((tmp_path / "b" / "cat").iterdir(), reverse=True)):
        path.rename(path.with_name(f"renamed{number}.png"))
    moved = load_task(f"pets={tmp_path / 'b'}", shots=4, validation_shots=2)
    assert moved.train.inputs != task.train.inputs
    assert data_digest(moved) == digest
    Image.new("RGB", (4, 4)).save(moved.train.inputs[0])
    assert data_digest(moved) != digest


def test_images_by_class_for_a_task_that_is_known(tmp_path):
    draw(tmp_path / "dog", 3)
    examples = load_examples(str(tmp_path), ["cat", "dog"])
    assert examples.labels == [1, 1, 1] and classes_of(examples, ["cat", "dog"])
    with pytest.raises(ValueError, match="label 'dog' is not a label of the task"):
        load_examples(str(tmp_path), ["cat", "horse"])


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
def test_a_damaged_image_is_named(tmp_path, damage):
    draw(tmp_path / "cat", 6, seed=0)
    draw(tmp_path / "dog", 6, seed=1)
    file = tmp_path / "cat" / "2.png"
    whole = file.read_bytes()
    file.write_bytes({"text": b"no image", "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"cat/2\.png cannot be read as an image"):
        load_task(str(tmp_path), validation_shots=1)


def test_folders_that_are_no_task(tmp_path):
    draw(tmp_path / "train" / "cat", 6, seed=0)
    with pytest.raises(ValueError, match=r"a task needs at least two classes, but it has \['cat'\]"):
        load_task(f"pets={tmp_path}")
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"dog holds no images; the endings that can be read are .png"):
        load_task(f"pets={tmp_path}")
    draw(tmp_path / "train" / "horse", 2, seed=1)
    (tmp_path / "train" / "dog").rmdir()
    with pytest.raises(ValueError, match="class 'horse' has 2 different images, but 3 are needed"):
        load_task(f"pets={tmp_path}", validation_shots=1)
    draw(tmp_path / "test" / "cow", 2, seed=2)
    with pytest.raises(ValueError, match=r"test of .*: label 'cow' does not occur in train"):
        load_task(f"pets={tmp_path}")
    (tmp_path / "more").mkdir()
    with pytest.raises(
        ValueError, match="holds the folder 'more' beside train; its splits can be train, training, val"
    ):
        load_task(f"pets={tmp_path}")
    (tmp_path / "new" / "cow").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no folders of images; it holds cow"):
        load_task(f"pets={tmp_path / 'new'}")
