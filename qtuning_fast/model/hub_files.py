"""Checkpoints in repositories of the Hugging Face hub: where they are, what is downloaded, and what may go wrong.

All requests are huggingface_hub's, which keeps what it downloads in its cache.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from qtuning_fast.model.checked_files import check_size
from qtuning_fast.model.checkpoint import CONFIG_FILE, MOST_INDEX_BYTES
from qtuning_fast.version import __version__

LIBRARY: dict[str, Any] = {"library_name": "qtuning_fast", "library_version": __version__}

_PATHS_A_REQUEST = 500
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass token"
# What requests of httpx, or of its successor, raise if no answer comes: huggingface_hub's own error is one of them.
_TRANSPORT: type[Exception] = next(each for each in HfHubHTTPError.__mro__ if each.__name__ == "HTTPError")


class HubError(OSError):
    """The hub did not do what was asked; the message is one line and names the way out."""


class NotOnHubError(HubError, FileNotFoundError):
    """There is no such repository, revision or file, or it cannot be seen from here."""


@dataclass
class HubFiles:
    """The files of one commit of a repository, which come into the hub's cache when they are needed.

    It can be pickled; a token goes along only if it is stored on the machine, not if it was given as text.

    Attributes:
        repo_id: the repository.
        commit: the commit, so that files of different pushes are never mixed.
        folder: the commit's folder in the cache.
        token, cache_dir, local_files_only, force_download: as in `QTuningModel.from_pretrained`.
    """

    repo_id: str
    commit: str
    folder: Path
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False
    _came: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def fetch(self, most_bytes: Mapping[str, int]) -> None:
        """Download files unless they are in the cache.

        Args:
            most_bytes: by name of a file, the most bytes that it may have; a larger one is not downloaded.

        Raises:
            CorruptFileError: a file is larger than that.
            HubError: the hub does not answer, or lacks a file.
        """
        lacking = [name for name in most_bytes if not self._is_there(name)]
        if not lacking:
            return
        with hub_errors(self.repo_id, revision=self.commit):
            if not self.local_files_only:
                self._check_sizes({name: most_bytes[name] for name in lacking})
            snapshot_download(
                self.repo_id,
                revision=self.commit,
                allow_patterns=lacking,  # names without wildcards
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                force_download=self.force_download,
                **LIBRARY,
            )
        for name in lacking:
            if not (self.folder / name).is_file():
                if self.local_files_only:
                    raise NotOnHubError(f"{self.repo_id}: {name} is not in the cache; leave local_files_only out")
                raise NotOnHubError(_lacks(self.repo_id, name))
        self._came.update(lacking)

    def fetch_if_there(self, most_bytes: Mapping[str, int]) -> list[str]:
        """Download those of some files that the repository has, and return their names; see `fetch`."""
        there = [name for name in most_bytes if (self.folder / name).is_file()]
        if not self.local_files_only and len(there) < len(most_bytes):
            with hub_errors(self.repo_id, revision=self.commit):
                there = [each.path for each in self._described(list(most_bytes))]
        self.fetch({name: most_bytes[name] for name in there})
        return there

    def _is_there(self, name: str) -> bool:
        return name in self._came or (not self.force_download and (self.folder / name).is_file())

    def _check_sizes(self, most_bytes: Mapping[str, int]) -> None:
        names = list(most_bytes)
        for first in range(0, len(names), _PATHS_A_REQUEST):
            some = names[first : first + _PATHS_A_REQUEST]
            for found in self._described(some):
                check_size(Path(self.repo_id, found.path), most_bytes[found.path], size=found.size)

    def _described(self, names: list[str]) -> list[RepoFile]:
        """Return what the hub says of those of the files that are there."""
        found = HfApi(token=self.token, **LIBRARY).get_paths_info(self.repo_id, names, revision=self.commit)
        return [each for each in found if isinstance(each, RepoFile) and each.path in names]

    def __deepcopy__(self, memo: dict[int, Any]) -> HubFiles:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"token": None if isinstance(self.token, str) else self.token}


@dataclass(frozen=True)
class Located:
    """Where a checkpoint is.

    Attributes:
        name: what the user calls it.
        folder: its folder, in the hub's cache for one of the hub.
        elsewhere: from where its files come when they are needed; None if they are in the folder.
    """

    name: str
    folder: Path
    elsewhere: HubFiles | None = None


class DownloadOptions(TypedDict, total=False):
    """How to download from the hub, in the words of transformers.

    Attributes:
        revision: a branch, a tag or a commit; None: the default branch.
        token: of the hub, as text; None: the one that is stored on this machine, if any; False: none.
        cache_dir: the hub's cache; None: the usual one.
        local_files_only: take what is in the cache, and download nothing.
        force_download: download what is in the cache, too.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool


def located(source: str | Path, **options: Unpack[DownloadOptions]) -> Located:
    """Return where a checkpoint is: in a folder, or else, for the name of a repository, on the hub.

    Of the hub's, only the index is downloaded.

    Args:
        source: a folder, or `user/name`. A `Path` is a folder in any case.
        **options: see `DownloadOptions`.

    Raises:
        TypeError: there is no such option.
        FileNotFoundError: it is neither.
        CorruptFileError: the index is too large.
        HubError: the hub does not answer, or does not show the repository.
    """
    unknown = sorted(options.keys() - DownloadOptions.__annotations__.keys())
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: no such option; there are {', '.join(DownloadOptions.__annotations__)}")
    folder = Path(source)
    if isinstance(source, Path) or folder.exists():
        return Located(str(source), folder)
    if not is_repo_id(source):
        raise FileNotFoundError(
            f"{source!r} is not a folder, nor the name of a repository on the hub, which would be user/name"
        )
    return on_hub(source, is_folder=False, **options)


def on_hub(repo_id: str, *, is_folder: bool = True, **options: Unpack[DownloadOptions]) -> Located:
    """Return where the checkpoint of a repository is; see `located`.

    Args:
        repo_id: the repository.
        is_folder: False if `repo_id` could have been meant as a folder that is not there.
        **options: see `DownloadOptions`.

    Raises:
        ValueError: the name cannot be that of a repository.
        CorruptFileError: the index is too large.
        HubError: the hub does not answer, or does not show the repository.
    """
    check_repo_id(repo_id)
    wanted: dict[str, Any] = {"repo_id": repo_id, "filename": CONFIG_FILE, **options, **LIBRARY}
    with hub_errors(repo_id, revision=options.get("revision"), is_folder=is_folder):
        described: Any = hf_hub_download(**wanted, dry_run=True)
        check_size(Path(repo_id, CONFIG_FILE), MOST_INDEX_BYTES, size=described.file_size or 0)
        index = Path(hf_hub_download(**wanted))
    more: dict[str, Any] = {name: value for name, value in options.items() if name != "revision"}
    return Located(repo_id, index.parent, HubFiles(repo_id, index.parent.name, index.parent, **more))


def is_repo_id(name: str) -> bool:
    """Return whether a name could be that of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_repo_id(repo_id: str) -> None:
    """Raise a ValueError if a name cannot be that of a repository."""
    if not isinstance(repo_id, str) or not is_repo_id(repo_id):
        raise ValueError(
            f"repo_id is {repo_id!r}; it must be user/name, of letters, digits, '-', '_' and '.', 96 characters at most"
        )


@contextmanager
def hub_errors(
    repo_id: str, *, revision: str | None = None, is_folder: bool = True, pushes: bool = False
) -> Iterator[None]:
    """Raise what huggingface_hub raises within the block as a `HubError` in one line.

    Args:
        repo_id: the repository.
        revision: its revision, if one was named.
        is_folder: False if `repo_id` could have been meant as a folder that is not there.
        pushes: whether the block writes to the repository.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        said = _in_words(error, repo_id, revision, pushes)
        if said is None:
            raise
        missing = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)
        kind = NotOnHubError if isinstance(error, missing) else HubError
        raise kind(said if is_folder else f"{repo_id} is not a folder here. As a name on the hub: {said}") from error


def _in_words(error: BaseException | None, repo_id: str, revision: str | None, pushes: bool) -> str | None:
    """Return what went wrong and what to do, or None for an error that is not the hub's."""
    hub, once_more = constants.ENDPOINT, "try the same again"
    if isinstance(error, LocalTokenNotFoundError):
        return f"no token is stored on this machine: {_LOG_IN}"
    if isinstance(error, GatedRepoError):
        return f"access to {repo_id} is granted by its owner: ask for it at {hub}/{repo_id}, and then {_LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}; name a branch, a tag or a commit of it"
    if isinstance(error, RemoteEntryNotFoundError):
        name = str(error.response.url).rpartition("/")[2]
        if name == CONFIG_FILE:
            return f"{repo_id} holds no {CONFIG_FILE} at this revision: no Q-tuning model was pushed there"
        return _lacks(repo_id, name)
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id} is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub; unset it"
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is None:
        return f"{repo_id} is not in the cache, and local_files_only forbids to ask the hub; leave it out"
    if isinstance(error, FileMetadataError):
        return f"what answers at {hub} is not a hub: check HF_ENDPOINT and the proxy, and {once_more}"
    if isinstance(error, HfHubHTTPError):
        return _status_in_words(error, repo_id, pushes)
    if isinstance(error, _TRANSPORT):
        return (
            f"the hub at {hub} cannot be reached, or the connection broke off ({type(error).__name__}): check the "
            f"network and HF_ENDPOINT, and {once_more}"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return f"the disk is full{where}; make room, or choose another place by HF_HOME, cache_dir or TMPDIR"
    if isinstance(error, OSError) and str(error).startswith("Consistency check failed"):
        return f"the download from {repo_id} broke off; {once_more}"
    if error is not None and error.__cause__ is not None:  # huggingface_hub's wrapping
        return _in_words(error.__cause__, repo_id, revision, pushes)
    if pushes and isinstance(error, RuntimeError):  # of uploads by hf_xet
        return f"uploading to {repo_id} failed: {_first_line(error)}; {once_more}"
    return None


def _lacks(repo_id: str, name: str) -> str:
    return f"{repo_id} lacks {name}, which {CONFIG_FILE} names; its owner must push it again"


def _status_in_words(error: HfHubHTTPError, repo_id: str, pushes: bool) -> str:
    status, hub = error.response.status_code, constants.ENDPOINT
    if isinstance(error, RepositoryNotFoundError) or (status in (401, 404) and not pushes):
        return (
            f"there is no repository {repo_id} on {hub}, or it is private and your token does not open it: check the "
            f"name, or {_LOG_IN}"
        )
    if status == 401:
        return f"the hub at {hub} takes no token from you, or does not know the one it got: {_LOG_IN}"
    if status == 403 and pushes:
        return f"your token may not write to {repo_id}: take one with permission to write, or a name of your own"
    if status == 403:
        return f"your token may not read {repo_id}: take one with permission, or ask its owner"
    if status == 429:
        return f"the hub at {hub} takes no more requests for now (429): wait, and try the same again"
    if status >= 500:
        return f"the hub at {hub} has a fault of its own ({status}): try the same again later"
    return f"the hub at {hub} refuses ({status}): {_first_line(error.server_message or error)}"


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
