"""Load a task from user data: a file, a folder of files or images, or a data set on the Hugging Face hub.

All errors in the data are found here, before training starts.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qtuning_fast.lifelong.data.hub import load_hub
from qtuning_fast.lifelong.data.image_folders import check_images, images_by_class, is_image_folder, read_image_folder
from qtuning_fast.lifelong.data.splits import split_files
from qtuning_fast.lifelong.data.tables import DataWarning, Table, is_readable, read_table, shortened, stem_and_ending
from qtuning_fast.lifelong.data.text_columns import (
    check_known_labels,
    is_unlabelled,
    read_label_sets,
    read_labels,
    read_numbers,
    read_texts,
    warn_about_joined_rows,
)
from qtuning_fast.lifelong.tasks import Examples, GivenLabel, Input, Labelled, Task, encoded_labels, few_shot_split
from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE, check_problem_type

if TYPE_CHECKING:
    from datasets import Dataset


def load_task(
    spec: str,
    *,
    shots: int | None = None,
    validation_shots: int = 16,
    test_size: int = 200,
    seed: int = 0,
    text_column: str = "text",
    label_column: str = "label",
    problem_type: str = SINGLE,
) -> Task:
    """Load a task from `spec`; `few_shot_split` draws its splits.

    Args:
        spec: `path` or `name=path`. The path is one of:

            - a file: .csv, .tsv, .json, .jsonl or .parquet, also compressed as .gz, .bz2 or .xz;
            - a folder with a file `train.*` and perhaps `validation.*` and `test.*`; `SPLIT_NAMES` lists other names;
            - a folder with a folder of images (.png, .jpg, ...) for each class, or with folders `train` and perhaps
              `validation` and `test` of such folders. Each drawn image is opened once as a check;
            - otherwise a data set on the Hugging Face hub: `name` or `organisation/name`, with `:config` if it has
              several.

            A split that is missing, or whose labels are hidden on the hub, is cut from the training examples.
        shots: training examples per class; None takes all.
        validation_shots, test_size, seed: see `few_shot_split`. Splits of the data itself are drawn from too; large
            numbers take them whole.
        text_column, label_column: names of the columns. Texts must be strings; labels must be strings, integers,
            booleans or a `ClassLabel`.
        problem_type: what the labels are: one class of each text, or with `"multi_label_classification"` any number of
            classes (lists; in CSV and TSV between semicolons), or with `"regression"` a number. `shots`,
            `validation_shots` and fifths then count examples in all.

    Warns:
        DataWarning: the data is readable, but something looks wrong: unused files, or labels that look alike.

    Raises:
        ImportError: a package is missing: `datasets` for the hub, pyarrow for Parquet, or Pillow for images.
        FileNotFoundError: the path does not exist, or the folder has no training data.
        ConnectionError: the hub does not answer.
        ValueError: the data cannot be read or used; the message says where and why.
    """
    check_problem_type(problem_type)
    name, path = parse_spec(spec)
    images = is_image_folder(Path(path).expanduser())
    if images and problem_type != SINGLE:
        raise ValueError(
            f"{path} has a folder of images for each class, so each image has one; problem_type={problem_type!r} does "
            "not fit (in Python, make a Task with labels of your own)"
        )
    splits, label_names = (
        read_image_folder(path) if images else _load_texts(path, text_column, label_column, problem_type)
    )
    inputs, labels = splits["train"]
    task = few_shot_split(
        inputs,
        labels,
        name=name,
        shots=shots,
        validation_shots=validation_shots,
        test_size=test_size,
        seed=seed,
        label_names=label_names,
        validation=splits.get("validation"),
        test=splits.get("test"),
        source=path,
        problem_type=problem_type,
    )
    if images:
        check_images([*task.train.inputs, *task.validation.inputs, *task.test.inputs])
    return task


def _load_texts(
    path: str, text_column: str, label_column: str, problem_type: str
) -> tuple[dict[str, Labelled], list[str]]:
    """Load the labelled texts of each split, and the names of the classes."""
    splits = _read_files(path) if _is_local(path) else _read_hub(path)
    if "train" not in splits:
        raise ValueError(f"{path} has no split 'train', only {', '.join(splits)}")
    _check_two_columns(text_column, label_column)
    texts = read_texts(splits["train"], text_column)
    labels, label_names = _read_labels(splits["train"], label_column, problem_type)
    warn_about_joined_rows(splits["train"], label_names)
    given: dict[str, Labelled] = {"train": (texts, labels)}
    reason = f"does not occur in train, which has [{shortened([repr(name) for name in label_names])}]"
    for split in ("validation", "test"):
        if split not in splits:
            continue
        table = splits[split]
        if is_unlabelled(table, label_column):
            note = f"{table.where}: not used, because its labels are all -1 (hidden); a split is cut from train instead"
            warnings.warn(note, DataWarning, stacklevel=2)
            continue
        found, _ = _read_labels(table, label_column, problem_type)
        given[split] = read_texts(table, text_column), found
        check_known_labels(table, found, label_names, reason)
        warn_about_joined_rows(table, label_names)
    return given, label_names


def _read_labels(table: Table, column: str, problem_type: str) -> tuple[Sequence[GivenLabel], list[str]]:
    """Read the label of each row, and the names of the classes; the name of a number is that of its column."""
    if problem_type == REGRESSION:
        return read_numbers(table, column), [column]
    return read_label_sets(table, column) if problem_type == MULTI else read_labels(table, column)


def _check_two_columns(text_column: str, label_column: str) -> None:
    if text_column == label_column:
        raise ValueError(f"text_column and label_column are both {text_column!r}; texts and labels are two columns")


def load_examples(
    path: str,
    label_names: Sequence[str],
    *,
    text_column: str = "text",
    label_column: str = "label",
    problem_type: str = SINGLE,
) -> Examples:
    """Load all labelled texts of a file, or images of a folder, for a task with known classes.

    Args:
        path: a file as in `load_task`, or a folder with a folder of images per class.
        label_names: the task's classes.
        text_column, label_column: the names of the columns.
        problem_type: what the labels are; see `load_task`.

    Raises:
        ImportError, FileNotFoundError, ValueError: as in `load_task`; also if a label is not among `label_names`.
    """
    file = Path(path).expanduser()
    reason = f"is not a label of the task, which has {shortened(label_names)}"
    inputs: Sequence[Input]
    labels: Sequence[GivenLabel]
    if is_image_folder(file):
        inputs, labels = images_by_class(file)
        check_images(inputs)
        if unknown := sorted(set(labels) - set(label_names)):
            raise ValueError(f"{path}: label {unknown[0]!r} {reason}")
    else:
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        _check_two_columns(text_column, label_column)
        table = read_table(file)
        texts, (labels, _) = read_texts(table, text_column), _read_labels(table, label_column, problem_type)
        check_known_labels(table, labels, label_names, reason)
        warn_about_joined_rows(table, label_names)
        inputs = texts
    return Examples(inputs, encoded_labels(labels, label_names, problem_type))


def parse_spec(spec: str) -> tuple[str, str]:
    """Return the name and the path of a task from its spec; see `load_task`.

    Raises:
        ValueError: the name or the path is empty, or the name is not UTF-8.
    """
    name, separator, path = spec.partition("=")
    if not separator or "/" in name or Path(spec).exists():  # a path may contain an equals sign
        path = spec
        file = Path(path).expanduser()
        name = stem_and_ending(file.name)[0] if file.is_file() else file.name.partition(":")[0]
    if not name or not path:
        raise ValueError(f"{spec!r} is not a task: write a path, or a name and a path as in reviews=data/reviews.csv")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name!r} cannot name a task, because it is not UTF-8; write a name and a path, as in reviews=..."
        ) from None
    return name, path


def _is_local(path: str) -> bool:
    """Whether `path` means a file or folder, even a missing one, so that a typing error never goes to the network."""
    file = Path(path)
    return (
        file.exists()
        or path.startswith((".", "~"))
        or is_readable(file.name)
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^/]+)?", path)
        or ("/" in path and file.parent.is_dir())
    )


def _read_files(path: str) -> dict[str, Table]:
    file = Path(path).expanduser()
    if file.is_file():
        return {"train": read_table(file, where=f"train of {file}")}
    if not file.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return {split: read_table(found, where=f"{split} of {found}") for split, found in split_files(file).items()}


def _read_hub(path: str) -> dict[str, Table]:
    return {split: _hub_table(data, f"{split} of {path}") for split, data in load_hub(path).items()}


def _hub_table(data: "Dataset", where: str) -> Table:
    from datasets import ClassLabel

    classes = {
        name: item.names
        for name, each in data.features.items()
        if isinstance(item := getattr(each, "feature", each), ClassLabel)
    }
    return Table(where, len(data), list(data.features), lambda name: data[name][:], classes)
