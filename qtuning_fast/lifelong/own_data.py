"""A task from a user's own data: a file, a folder of files or of images, or a data set on the Hugging Face hub.

Everything that can be wrong with the data is found here, before any training starts.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from qtuning_fast.lifelong.own_images import check_images, images_by_class, is_image_folder, read_image_folder
from qtuning_fast.lifelong.tasks import SPLITS, Examples, Input, Labelled, Task, few_shot_split

if TYPE_CHECKING:
    from datasets import Dataset

# By the ending of a file: the loader of `datasets` that reads it, and how. An empty cell or the word "None" in a
# table is text like any other; that an example needs some text is checked for all kinds of file alike.
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "delimiter": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
STRINGS = ("string", "large_string", "string_view")
HUB_TIMEOUT = 10.0  # seconds


def load_task(
    spec: str,
    *,
    shots: int | None = None,
    validation_shots: int = 16,
    test_size: int = 200,
    seed: int = 0,
    text_column: str = "text",
    label_column: str = "label",
) -> Task:
    """Read a task from `spec`, and draw its splits by `few_shot_split`.

    Args:
        spec: `path` or `name=path`. A path leads to a file (.csv, .tsv, .json, .jsonl, .parquet), or to a folder with
            `train.*` and, where there are any, `validation.*` and `test.*` of these kinds. What is no path here is
            a data set on the Hugging Face hub: `name`, `organisation/name`, with `:config` where it has several.
            Images are a folder with a folder of files (.png, .jpg, ...) for each class, or with `train`, and maybe
            `validation` and `test`, of such folders. Each image that is drawn is opened once, to see that it can be.
            A split that is missing, or whose labels the hub keeps secret, is cut from the training examples.
        shots: training examples a class; None takes all.
        validation_shots, test_size, seed: see `few_shot_split`; splits of the data's own are drawn from too, and
            taken whole where these numbers are large enough.
        text_column, label_column: texts must be strings; labels strings, integers, booleans or a `ClassLabel`.

    Raises:
        ImportError: the package `datasets`, or for images Pillow, is missing.
        FileNotFoundError: no such path, or a folder without training data.
        ConnectionError: the hub does not answer.
        ValueError: the data cannot be read, or not be used: the message says which, where and why.
    """
    name, path = _name_and_path(spec)
    images = is_image_folder(Path(path).expanduser())
    splits, label_names = read_image_folder(path) if images else _read_texts(path, text_column, label_column)
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
    )
    if images:
        check_images([*task.train.inputs, *task.validation.inputs, *task.test.inputs])
    return task


def _read_texts(path: str, text_column: str, label_column: str) -> tuple[dict[str, Labelled], list[str]]:
    """The labelled texts of each split, and the names of the classes."""
    _require_datasets()
    splits = _read_files(path) if _is_local(path) else _read_hub(path)
    if "train" not in splits:
        raise ValueError(f"{path} has no split 'train', only {', '.join(splits)}")
    texts = _texts(splits["train"], text_column, f"train of {path}")
    labels, label_names = _labels(splits["train"], label_column, f"train of {path}")
    own: dict[str, Labelled] = {"train": (texts, labels)}
    for split in ("validation", "test"):
        where = f"{split} of {path}"
        if split in splits and not _is_unlabelled(splits[split], label_column, where):
            split_labels, _ = _labels(splits[split], label_column, where)
            if unknown := sorted(set(split_labels) - set(label_names)):
                raise ValueError(f"{where}: label {unknown[0]!r} does not occur in train, which has {label_names}")
            own[split] = _texts(splits[split], text_column, where), split_labels
    return own, label_names


def load_examples(path: str, label_names: Sequence[str]) -> Examples:
    """All labelled texts of a file or images of a folder, for a task whose classes are known.

    Args:
        path: a file as in `load_task`, with the columns `text` and `label`; or a folder with one of images a class.
        label_names: the task's classes.

    Raises:
        ImportError, FileNotFoundError, ValueError: as in `load_task`; also a label that is none of these.
    """
    file = Path(path).expanduser()
    inputs: Sequence[Input]
    if is_image_folder(file):
        inputs, labels = images_by_class(file)
        check_images(inputs)
    else:
        _require_datasets()
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        data = _read_file(file)
        inputs, labels = _texts(data, "text", path), _labels(data, "label", path)[0]
    if unknown := sorted(set(labels) - set(label_names)):
        raise ValueError(f"{path}: label {unknown[0]!r} is none of the task's, which are {', '.join(label_names)}")
    return Examples(inputs, [list(label_names).index(label) for label in labels])


def _require_datasets() -> None:
    try:
        import datasets  # noqa: F401  (an optional dependency, and slow to import)
    except ImportError as error:
        raise ImportError("reading your own data needs the package datasets: pip install datasets") from error


def _name_and_path(spec: str) -> tuple[str, str]:
    name, separator, path = spec.partition("=")
    if not separator or "/" in name or Path(spec).exists():  # a path may hold an equals sign itself
        path = spec
        file = Path(path).expanduser()
        name = file.stem if file.is_file() else file.name.partition(":")[0]
    if not name or not path:
        raise ValueError(f"{spec!r} is not a task: write a path, or a name and a path as in reviews=data/reviews.csv")
    return name, path


def _is_local(path: str) -> bool:
    """Whether `path` means the file system, there or not: then a slip of the pen never goes to the network."""
    file = Path(path)
    return (
        file.exists()
        or path.startswith((".", "~"))
        or file.suffix.lower() in LOADERS
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^/]+)?", path)
        or ("/" in path and file.parent.is_dir())
    )


def _read_files(path: str) -> "dict[str, Dataset]":
    file = Path(path).expanduser()
    if file.is_file():
        return {"train": _read_file(file)}
    if not file.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}")
    found: dict[str, Dataset] = {}
    for split in SPLITS:
        candidates = sorted(child for child in file.iterdir() if child.stem == split and child.is_file())
        if len(candidates) > 1:
            raise ValueError(f"{file} has several files for {split}: {', '.join(child.name for child in candidates)}")
        if candidates:
            found[split] = _read_file(candidates[0])
        elif split == "train":
            holds = ", ".join(sorted(child.name for child in file.iterdir())) or "nothing"
            raise FileNotFoundError(
                f"{file} has no file train{{{','.join(LOADERS)}}} and no folders of images; it holds {holds}"
            )
    return found


def _read_file(file: Path) -> "Dataset":
    import datasets

    ending = file.suffix.lower()
    if ending not in LOADERS:
        raise ValueError(f"{file} ends in {file.suffix!r}; the endings that can be read are {', '.join(LOADERS)}")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty")
    loader, options = LOADERS[ending]
    try:
        # Paths are patterns to the loader: a bracket in one would otherwise match something else, or nothing.
        return datasets.load_dataset(loader, data_files=glob.escape(str(file)), split="train", **options)
    except (datasets.exceptions.DatasetsError, ValueError, StopIteration) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{file} has no rows") from error
        reason = str(error.__cause__ or error).strip()
        raise ValueError(f"{file} cannot be read as {loader}: {reason or 'it holds no data'}") from error


def _read_hub(path: str) -> "dict[str, Dataset]":
    import datasets

    name, _, config = path.partition(":")
    if not datasets.config.HF_HUB_OFFLINE:  # offline the cache is all there is, and nobody is asked
        _reach(datasets.config.HF_ENDPOINT, wanted=path)
    try:
        return dict(datasets.load_dataset(name, config or None))
    except ConnectionError as error:
        raise ConnectionError(f"{path} is no path here, and cannot be fetched from the hub: {error}") from error
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no path here, and cannot be loaded from the hub: {error}") from error


def _reach(endpoint: str, wanted: str) -> None:
    """Fail soon where there is no network: `load_dataset` would try for half a minute."""
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except HTTPError:
        pass  # it answers, and that is all that is asked
    except OSError as error:
        raise ConnectionError(
            f"{wanted} is no path here, and the hub at {endpoint} cannot be reached: {error}. "
            "Set HF_HUB_OFFLINE=1 to use a data set that was fetched before."
        ) from error


def _feature(data: "Dataset", column: str, where: str) -> Any:
    if column not in data.features:
        raise ValueError(
            f"{where}: there is no column {column!r}, only {', '.join(map(repr, data.features))}; "
            "rename the columns to text and label"
        )
    return data.features[column]


def _is_unlabelled(data: "Dataset", label_column: str, where: str) -> bool:
    """Whether this is a test split whose labels are kept secret, as on the hub: -1 throughout."""
    from datasets import ClassLabel

    return isinstance(_feature(data, label_column, where), ClassLabel) and set(data[label_column]) == {-1}


def _texts(data: "Dataset", column: str, where: str) -> list[str]:
    feature = _feature(data, column, where)
    if getattr(feature, "dtype", None) not in STRINGS:
        raise ValueError(f"{where}: column {column!r} must hold text, but holds {getattr(feature, 'dtype', feature)}")
    texts = data[column][:]
    _refuse_gaps([text is None or not text.strip() for text in texts], column, where)
    return texts


def _labels(data: "Dataset", column: str, where: str) -> tuple[list[str], list[str]]:
    """The label of each example, and the names of all labels in order: a `ClassLabel`'s own, or else sorted."""
    from datasets import ClassLabel

    feature, values = _feature(data, column, where), data[column][:]
    if isinstance(feature, ClassLabel):
        _refuse_gaps([value is None or value < 0 for value in values], column, where)
        return [feature.names[value] for value in values], feature.names
    dtype = getattr(feature, "dtype", "")
    if dtype not in STRINGS and not re.fullmatch(r"bool|u?int\d+", dtype):
        raise ValueError(f"{where}: labels must be text, integers or booleans, but {column!r} holds {dtype or feature}")
    _refuse_gaps([value is None or value == "" for value in values], column, where)
    return [str(value) for value in values], [str(value) for value in sorted(set(values))]


def _refuse_gaps(gaps: list[bool], column: str, where: str) -> None:
    if any(gaps):
        first = gaps.index(True) + 1
        raise ValueError(
            f"{where}: column {column!r} is empty in {sum(gaps)} of {len(gaps)} rows, first in row {first}"
        )
