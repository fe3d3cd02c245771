"""Data sets of the Hugging Face hub, or local copies of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from qtuning_fast.lifelong.data.splits import names_by_split, warn_about_ignored

if TYPE_CHECKING:
    from datasets import Dataset

HUB_TIMEOUT = 10.0  # seconds


def load_hub(path: str) -> dict[str, Dataset]:
    """Load a data set by its name on the hub, `name` or `organisation/name`, with `:config` if it has several.

    Returns:
        It by split; splits of other names than in `SPLIT_NAMES` only where there are no others.

    Raises:
        ImportError: the package datasets is missing.
        ConnectionError: the hub does not answer.
        ValueError: there is no such data set.
    """
    try:
        import datasets  # an optional dependency, and slow to import
    except ImportError as error:
        raise ImportError(
            f"{path} is not a local path, and a data set on the hub needs the package datasets: pip install datasets"
        ) from error

    name, _, config = path.partition(":")
    if not datasets.config.HF_HUB_OFFLINE:  # offline, only the cache is used
        _check_reachable(datasets.config.HF_ENDPOINT, wanted=path)
    try:
        loaded = dict(datasets.load_dataset(name, config or None))
    except ConnectionError as error:
        raise ConnectionError(f"{path} is not a local path, and cannot be fetched from the hub: {error}") from error
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a local path, and cannot be loaded from the hub: {error}") from error
    return _by_split(path, loaded)


def load_local_copy(folder: Path, config: str | None = None) -> dict[str, Dataset]:
    """Load a data set from a folder: a copy of its files on the hub, or what `save_to_disk` wrote.

    Args:
        folder: the folder.
        config: of several, which one; a copy that has none is read as it is.

    Raises:
        ImportError: the package datasets is missing.
        ValueError: the folder holds no data set.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{folder} is read by the package datasets: pip install datasets") from error
    try:
        if (folder / "state.json").is_file():  # a single split
            return {"train": datasets.load_from_disk(str(folder))}
        if (folder / "dataset_dict.json").is_file():
            return _by_split(str(folder), dict(datasets.load_from_disk(str(folder))))
        configs = datasets.get_dataset_config_names(str(folder))
        return _by_split(str(folder), dict(datasets.load_dataset(str(folder), config if config in configs else None)))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded as a data set: {error}") from error


def _by_split(path: str, loaded: dict[str, Dataset]) -> dict[str, Dataset]:
    found = names_by_split(path, loaded)
    if not found:
        return loaded
    warn_about_ignored(path, [split for split in loaded if split not in found.values()])
    return {split: loaded[theirs] for split, theirs in found.items()}


def _check_reachable(endpoint: str, wanted: str) -> None:
    """Fail at once without a network: `load_dataset` would retry for half a minute."""
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except HTTPError:
        pass  # any answer will do
    except OSError as error:
        raise ConnectionError(
            f"{wanted} is not a local path, and the hub at {endpoint} cannot be reached: {error}. "
            "Set HF_HUB_OFFLINE=1 to use a data set from the cache."
        ) from error
