"""Find the splits of a folder or a data set by their usual names."""

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
    """The split that this name means, in upper or lower case; None if it means none."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def split_files(folder: Path) -> dict[str, Path]:
    """The file of each split in a folder; a warning names the files that are not used.

    Raises:
        FileNotFoundError: there is no file for `train`.
        ValueError: a split has several files, or its file cannot be read.
    """
    children = visible_entries(folder)
    files = [child for child in children if not child.is_dir()]  # broken links too: their splits are missing
    named = names_by_split(folder, [file.name for file in files if is_readable(file.name)])
    found = {split: folder / name for split, name in named.items()}
    for file in files:  # otherwise the split would be cut from train
        split = split_named(stem_and_ending(file.name)[0])
        if split is not None and split not in found:
            raise ValueError(
                f"{file} ends in {stem_and_ending(file.name)[1]!r}, so it cannot be read as the split {split}; "
                f"save it as one of {', '.join(ENDINGS)}, or move it elsewhere"
            )
    if "train" not in found:
        holds = ", ".join(child.name + "/" * child.is_dir() for child in children) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no file train{{{','.join(ENDINGS)}}} and no folders of images; it holds {holds}"
        )
    warn_about_ignored(folder, [child for child in children if child not in found.values()])
    return found


def names_by_split(source: Path | str, names: Iterable[str]) -> dict[str, str]:
    """The name of each split, among the names of files, folders or splits of a source.

    Raises:
        ValueError: two names mean the same split.
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
    """The files and folders in a folder, in order, without hidden ones."""
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def warn_about_ignored(source: Path | str, ignored: Iterable[Path | str]) -> None:
    """Warn about files that are not used; name the first ten."""
    names = [str(each.relative_to(source)) if isinstance(each, Path) else each for each in ignored]
    if names:
        warnings.warn(f"{source}: not used: {shortened(names)}", DataWarning, stacklevel=2)
