"""Images of one's own: a folder with a folder of files for each class, or with train, validation and test of these."""

from collections.abc import Sequence
from pathlib import Path

from qtuning_fast.lifelong.images import open_image
from qtuning_fast.lifelong.tasks import SPLITS, Input, Labelled

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def is_image_folder(folder: Path) -> bool:
    """Whether folders of images stand in it or in its folder `train`, and no file `train.*`."""
    if not folder.is_dir() or any(child.is_file() and child.stem == "train" for child in folder.iterdir()):
        return False
    return any(_is_image(file) for pattern in ("*/*", "train/*/*") for file in folder.glob(pattern))


def read_image_folder(path: str) -> tuple[dict[str, Labelled], list[str]]:
    """The images of each split with the names of their classes, and all names in order.

    Raises:
        ValueError: a folder that is no split and no class, a class without images, or one that train does not have.
    """
    folder = Path(path).expanduser()
    names = [child.name for child in _folders(folder)]
    if "train" not in names:
        whole = images_by_class(folder)
        return {"train": whole}, sorted(set(whole[1]))
    if unknown := sorted(set(names) - set(SPLITS)):
        raise ValueError(
            f"{folder} holds the folder {unknown[0]!r} beside train; its splits can be {', '.join(SPLITS)}"
        )
    splits: dict[str, Labelled] = {split: images_by_class(folder / split) for split in SPLITS if split in names}
    classes = sorted(set(splits["train"][1]))
    for split, (_, labels) in splits.items():
        if others := sorted(set(labels) - set(classes)):
            raise ValueError(f"{split} of {path}: label {others[0]!r} does not occur in train, which has {classes}")
    return splits, classes


def images_by_class(folder: Path) -> tuple[list[Path], list[str]]:
    """The images in the folders of `folder`, whose names are the classes.

    Raises:
        ValueError: one of them holds no image.
    """
    images: list[Path] = []
    labels: list[str] = []
    for child in _folders(folder):
        found = sorted(file.absolute() for file in child.iterdir() if _is_image(file))
        if not found:
            raise ValueError(f"{child} holds no images; the endings that can be read are {', '.join(ENDINGS)}")
        images += found
        labels += [child.name] * len(found)
    return images, labels


def check_images(images: Sequence[Input]) -> None:
    """Open each of them, so that a damaged one shows before any training.

    Raises:
        ImportError, ValueError: as `open_image`.
    """
    for image in images:
        open_image(Path(image))


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _is_image(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in ENDINGS and not file.name.startswith(".")
