"""Read image folders: one folder of files per class, or folders train, validation and test of such folders."""

from collections.abc import Sequence
from pathlib import Path

from qtuning_fast.lifelong.data.images import open_image
from qtuning_fast.lifelong.data.splits import (
    SPLIT_NAMES,
    names_by_split,
    split_named,
    visible_entries,
    warn_about_ignored,
)
from qtuning_fast.lifelong.data.tables import is_readable, stem_and_ending
from qtuning_fast.lifelong.tasks import Input, Labelled

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def is_image_folder(folder: Path) -> bool:
    """Whether the folder, or its folder `train`, contains folders of images, and it has no file `train.*` of texts."""
    if not folder.is_dir():
        return False
    files = [child.name for child in visible_entries(folder) if not child.is_dir() and is_readable(child.name)]
    if any(split_named(stem_and_ending(name)[0]) == "train" for name in files):
        return False
    holders = [folder, *(child for child in _folders(folder) if split_named(child.name) == "train")]
    return any(_is_image(file) for holder in holders for file in holder.glob("*/*"))


def read_image_folder(path: str) -> tuple[dict[str, Labelled], list[str]]:
    """Read the images of each split with their class names, and all class names in order.

    Split folders have the names in `SPLIT_NAMES`. A warning names the files that are not images.

    Raises:
        ValueError: a folder is neither a split nor a class, a class has no images, two folders are for one split, or
            train lacks a class.
    """
    folder = Path(path).expanduser()
    children = _folders(folder)
    # A folder `train` without folders of images is a class, for example of vehicles.
    if not any(split_named(child.name) == "train" and any(map(_is_image, child.glob("*/*"))) for child in children):
        whole = images_by_class(folder)
        return {"train": whole}, sorted(set(whole[1]))
    if unknown := [child.name for child in children if split_named(child.name) is None]:
        names = ", ".join(name for names in SPLIT_NAMES.values() for name in names)
        raise ValueError(f"{folder} holds the folder {unknown[0]!r} beside train; its splits can be {names}")
    folders = {
        split: folder / name for split, name in names_by_split(folder, [child.name for child in children]).items()
    }
    warn_about_ignored(folder, [child for child in visible_entries(folder) if not child.is_dir()])
    found = {split: images_by_class(folders[split]) for split in folders}
    classes = sorted(set(found["train"][1]))
    for split, (_, labels) in found.items():
        if others := sorted(set(labels) - set(classes)):
            raise ValueError(f"{split} of {path}: label {others[0]!r} does not occur in train, which has {classes}")
    return {**found}, classes


def images_by_class(folder: Path) -> tuple[list[Path], list[str]]:
    """Read the images in the folders of `folder`, which are named after the classes; a warning names other files.

    Raises:
        ValueError: a class has no images.
    """
    images: list[Path] = []
    labels: list[str] = []
    ignored = [child for child in visible_entries(folder) if not child.is_dir()]
    for child in _folders(folder):
        found = images_in(child)
        if not found:
            raise ValueError(f"{child} holds no images; the endings that can be read are {', '.join(ENDINGS)}")
        images += [file.absolute() for file in found]
        labels += [child.name] * len(found)
        ignored += [file for file in visible_entries(child) if file not in set(found)]
    warn_about_ignored(folder, ignored)
    return images, labels


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder, without those of folders in it."""
    return [file for file in visible_entries(folder) if _is_image(file)]


def check_images(images: Sequence[Input]) -> None:
    """Open each image, so that damaged ones are found before training.

    Raises:
        ImportError, ValueError: as `open_image`.
    """
    for image in images:
        open_image(image)


def _folders(folder: Path) -> list[Path]:
    return [child for child in visible_entries(folder) if child.is_dir()]


def _is_image(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in ENDINGS and not file.name.startswith(".")
