"""Which file or folder of a folder is which split, by the names that people use."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

from qtuning_fast.lifelong.data.tables import ENDINGS, DataWarning, is_readable, shortened, stem_and_ending

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


def split_named(name: str) -> str | None:
    """The split that goes by this name, in upper or lower case; None where none does."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def split_files(folder: Path) -> dict[str, Path]:
    """The file of each split that there is; what is ignored is warned of by name.

    Raises:
        FileNotFoundError: there is none for `train`.
        ValueError: there are several for one split, or the one that there is cannot be read.
    """
    children = visible_entries(folder)
    files = [child for child in children if not child.is_dir()]  # links to nothing too: what they stood for is missed
    named = names_by_split(folder, [file.name for file in files if is_readable(file.name)])
    found = {split: folder / name for split, name in named.items()}
    for file in files:  # a split that is not used would be cut from train instead
        split = split_named(stem_and_ending(file.name)[0])
        if split is not None and split not in found:
            raise ValueError(
                f"{file} ends in {stem_and_ending(file.name)[1]!r}, so that it cannot be read as the split {split}; "
                f"the endings that can be are {', '.join(ENDINGS)}: save it as one of these, or move it elsewhere"
            )
    if "train" not in found:
        holds = ", ".join(child.name + "/" * child.is_dir() for child in children) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no file train{{{','.join(ENDINGS)}}} and no folders of images; it holds {holds}"
        )
    warn_about_ignored(folder, [child for child in children if child not in found.values()])
    return found


def names_by_split(source: Path | str, names: Iterable[str]) -> dict[str, str]:
    """Which of the names of files, folders or splits of a source is which split.

    Raises:
        ValueError: two of them are the same split.
    """
    found: dict[str, str] = {}
    for name in names:
        split = split_named(stem_and_ending(name)[0])
        if split in found:
            raise ValueError(f"{source} has several files for {split}: {found[split]}, {name}; only one can be used")
        if split is not None:
            found[split] = name
    return found


def visible_entries(folder: Path) -> list[Path]:
    """What is in a folder, in order, but for hidden files."""
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def warn_about_ignored(source: Path | str, ignored: Iterable[Path | str]) -> None:
    """Name what is not used, the first ten of them."""
    names = [str(each.relative_to(source)) if isinstance(each, Path) else each for each in ignored]
    if names:
        warnings.warn(f"{source}: not used: {shortened(names)}", DataWarning, stacklevel=2)
