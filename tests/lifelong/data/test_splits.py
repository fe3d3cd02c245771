"""Splits of a folder by the names that people use, and files that are not used, which are named."""

from __future__ import annotations

import gzip
import os
import warnings
from pathlib import Path

import datasets
import pytest

from qtuning_fast.lifelong.data.loading import load_task
from qtuning_fast.lifelong.data.splits import names_by_split, split_files, split_named
from qtuning_fast.lifelong.data.tables import DataWarning

VALIDATION = ["validation.csv", "valid.csv", "val.csv", "dev.csv", "eval.csv", "Dev.CSV", "VALID.csv.gz"]
TEST = ["test.csv", "testing.csv", "Test.csv", "TEST.CSV", "test.csv.gz", "test.CSV.GZ"]
TRAIN = ["train.csv", "training.csv", "Train.csv", "train.csv.gz"]


def write(file: Path, word: str) -> None:
    content = "text,label\n" + "".join(f"{word} {i},{'good' if i % 2 else 'bad'}\n" for i in range(40))
    file.write_bytes(gzip.compress(content.encode()) if file.suffix.lower() == ".gz" else content.encode())


@pytest.mark.parametrize(("split", "name"), [("validation", name) for name in VALIDATION] + [("test", n) for n in TEST])
def test_a_split_is_used_under_each_of_its_names(split: str, name: str, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "train")
    write(tmp_path / name, "held out")
    task = load_task(f"reviews={tmp_path}", validation_shots=2, test_size=4)
    assert all(str(text).startswith("held out") for text in getattr(task, split).inputs)
    other = task.test if split == "validation" else task.validation
    assert all(str(text).startswith("train") for text in [*task.train.inputs, *other.inputs])


@pytest.mark.parametrize("name", TRAIN)
def test_names_of_train(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, "train")
    assert len(load_task(f"reviews={tmp_path}", validation_shots=2, test_size=4).train) == 32


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("dev.csv", "val.csv"), "validation"),
        (("test.csv", "test.csv.gz"), "test"),
        (("Test.csv", "test.tsv"), "test"),
        (("train.json", "training.parquet"), "train"),
    ],
)
def test_two_files_for_one_split_are_refused(names: tuple[str, str], split: str, tmp_path: Path) -> None:
    if split != "train":
        write(tmp_path / "train.csv", "train")
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=rf"{tmp_path} has several files for {split}: {names[0]}, {names[1]};"):
        load_task(f"reviews={tmp_path}")


@pytest.mark.parametrize("name", ["test.xlsx", "Dev.txt", "test.csv.zip", "valid.csv~"])
def test_a_split_that_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "train")
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=rf"{name} ends in .* cannot be read as the split (test|validation); .* \.csv"):
        load_task(f"reviews={tmp_path}")


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
@pytest.mark.parametrize("kind", ["link to nothing", "link to itself", "pipe"])
def test_a_split_that_is_no_file_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "train")
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to(tmp_path / (name if kind == "link to itself" else "gone.csv"))
    with pytest.raises(FileNotFoundError, match=rf"{name} is a broken link or not a regular file"):
        load_task(f"reviews={tmp_path}", validation_shots=2)


def test_folders_are_told_from_files(tmp_path: Path) -> None:
    (tmp_path / "train.csv").mkdir()
    (tmp_path / "train.txt.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"has no file train.*; it holds train\.csv/, train\.txt\.csv$"):
        load_task(f"reviews={tmp_path}")


def test_what_is_not_used_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "train")
    for name in ("README.md", "train.csv.bak", "unlabelled.csv", "test-2.csv", ".DS_Store", "._train.csv"):
        (tmp_path / name).touch()
    (tmp_path / "old").mkdir()
    said = f"^{tmp_path}: not used: README.md, old, test-2.csv, train.csv.bak, unlabelled.csv$"
    with pytest.warns(DataWarning, match=said):
        load_task(f"reviews={tmp_path}", validation_shots=2)
    for number in range(20):
        (tmp_path / f"a{number:02d}").touch()
    with pytest.warns(DataWarning, match="not used: README.md, a00, .*, a08 and 15 more$"):
        split_files(tmp_path)


def test_nothing_is_said_where_all_is_used(tmp_path: Path) -> None:
    for name in ("train.csv", "val.tsv", "test.json"):
        (tmp_path / name).touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = split_files(tmp_path)
    assert {split: file.name for split, file in found.items()} == {
        "train": "train.csv", "validation": "val.tsv", "test": "test.json",
    }  # fmt: skip


def test_splits_by_their_names() -> None:
    assert [split_named(name) for name in ("TRAIN", "Val", "testing", "tests", "")] == [
        "train",
        "validation",
        "test",
        None,
        None,
    ]
    assert names_by_split("a set", ["train", "dev", "more"]) == {"train": "train", "validation": "dev"}


def test_splits_of_the_hub_that_are_not_used_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_list([{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)])
    loaded = datasets.DatasetDict({"train": rows, "dev": rows, "unsupervised": rows})
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    with (
        pytest.warns(DataWarning, match="^org/set: not used: unsupervised$"),
        pytest.raises(ValueError, match="0 diff"),
    ):
        load_task("org/set")  # train holds what dev holds
