"""Images of one's own: a folder with a folder of files for each class, or with train, validation and test of these."""

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
    """Whether folders of images stand in it or in its folder `train`, and no file `train.*` that holds texts."""
    if not folder.is_dir():
        return False
    files = [child.name for child in visible_entries(folder) if not child.is_dir() and is_readable(child.name)]
    if any(split_named(stem_and_ending(name)[0]) == "train" for name in files):
        return False
    holders = [folder, *(child for child in _folders(folder) if split_named(child.name) == "train")]
    return any(_is_image(file) for holder in holders for file in holder.glob("*/*"))


def read_image_folder(path: str) -> tuple[dict[str, Labelled], list[str]]:
    """The images of each split with the names of their classes, and all names in order.

    Splits are folders by the names of `SPLIT_NAMES`. Files that are no images are warned of.

    Raises:
        ValueError: a folder that is no split and no class, a class without images, two folders for one split, or a
            class that train does not have.
    """
    folder = Path(path).expanduser()
    children = _folders(folder)
    # A folder of that name without folders of images is a class: of vehicles, say.
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
    splits: dict[str, Labelled] = {split: images_by_class(folders[split]) for split in folders}
    classes = sorted(set(splits["train"][1]))
    for split, (_, labels) in splits.items():
        if others := sorted(set(labels) - set(classes)):
            raise ValueError(f"{split} of {path}: label {others[0]!r} does not occur in train, which has {classes}")
    return splits, classes


def images_by_class(folder: Path) -> tuple[list[Path], list[str]]:
    """The images in the folders of `folder`, whose names are the classes; what else is there is warned of.

    Raises:
        ValueError: one of them holds no image.
    """
    images: list[Path] = []
    labels: list[str] = []
    ignored = [child for child in visible_entries(folder) if not child.is_dir()]
    for child in _folders(folder):
        found = [file for file in visible_entries(child) if _is_image(file)]
        if not found:
            raise ValueError(f"{child} holds no images; the endings that can be read are {', '.join(ENDINGS)}")
        images += [file.absolute() for file in found]
        labels += [child.name] * len(found)
        ignored += [file for file in visible_entries(child) if file not in set(found)]
    warn_about_ignored(folder, ignored)
    return images, labels


def check_images(images: Sequence[Input]) -> None:
    """Open each of them, so that a damaged one shows before any training.

    Raises:
        ImportError, ValueError: as `open_image`.
    """
    for image in images:
        open_image(Path(image))


def _folders(folder: Path) -> list[Path]:
    return [child for child in visible_entries(folder) if child.is_dir()]


def _is_image(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in ENDINGS and not file.name.startswith(".")
