"""JSON and tensor files with checksums, replaced atomically.

A file is written beside its destination and moved there, so a killed process leaves either the old file or the new one.
Reading verifies a SHA-256, so a truncated or altered file is an error. A file may come from anybody: reading it runs no
code, leaves its folder by no name and no link, and takes no more memory than the caller allows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

_CHECKSUM = "checksum"
_DEEPEST = 64  # of lists and dicts in one another
_TENSORS_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*-[0-9a-f]{12}\.safetensors")  # no way out, on any system
TEMPORARY = ".part"  # suffix of a file that is still being written


class CorruptFileError(ValueError):
    """A file differs from what was written."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with its checksum."""
    text = json.dumps({**content, _CHECKSUM: _json_digest(content)}, indent=2, allow_nan=False)
    _replace(path, text.encode())


def read_json(path: Path, *, most_bytes: int | None = None) -> dict[str, Any]:
    """Read a file that `write_json` wrote.

    Args:
        most_bytes: refuse a larger file.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: the file differs from what was written.
    """
    check_size(path, most_bytes)
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop(_CHECKSUM)
        _check_depth(content)
        digest = _json_digest(content)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, MemoryError):
        raise CorruptFileError(f"{path} is damaged: it is not valid JSON") from None
    if checksum != digest:
        raise CorruptFileError(f"{path} is damaged: its content does not match its checksum")
    return content


def _check_depth(content: Any) -> None:
    """Raise a ValueError if lists and dicts lie too deep in one another: comparing and printing them would fail."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [
            each
            for parent in level
            for each in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(each, (dict, list))
        ]
    if level:
        raise ValueError("too deep")


def write_tensors(folder: Path, stem: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write a safetensors file named by its content; return its `file` name and `sha256`, for `read_tensors`.

    Different content has a different name, so the files of an older index stay valid until the new index is in place.
    """
    data = _serialized(tensors)
    digest = hashlib.sha256(data).hexdigest()
    name = f"{stem}-{digest[:12]}.safetensors"
    _replace(folder / name, data)
    return {"file": name, "sha256": digest}


def read_tensors(folder: Path, entry: Mapping[str, Any], *, most_bytes: int | None = None) -> dict[str, Tensor]:
    """Read the tensors of an entry that `write_tensors` returned.

    Args:
        most_bytes: refuse a larger file.

    Raises:
        CorruptFileError: the file is missing or differs from what was written.
    """
    name, digest = checked_name(folder, entry), entry.get("sha256")
    path = folder / name
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing, but the index beside it names it")
    check_link(path)
    check_size(path, most_bytes)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise CorruptFileError(f"{path} is damaged: its content does not match its SHA-256")
    try:
        # Cloned into memory aligned as PyTorch aligns it, because sums in a matrix product may depend on alignment.
        return {name: tensor.clone() for name, tensor in safetensors.load(data).items()}
    except (SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from None


def checked_name(folder: Path, entry: Mapping[str, Any]) -> str:
    """Return the file that an entry names.

    Raises:
        CorruptFileError: it is not the name of a file that `write_tensors` writes into the folder.
    """
    name = entry.get("file")
    if not isinstance(name, str) or not _TENSORS_NAME.fullmatch(name):
        raise CorruptFileError(f"{folder}: the index names {name!r}, which is not the name of a tensor file beside it")
    return name


def check_link(path: Path) -> None:
    """Raise a CorruptFileError if a file is a link out of its folder; the cache of the hub is made of links."""
    folder, target = path.parent.resolve(), path.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":  # cache/models--user--name/snapshots/commit
        homes += [folder.parents[1] / "blobs", folder.parents[2] / "blobs"]
    if not any(target.is_relative_to(home) for home in homes):
        raise CorruptFileError(f"{path} is a link out of its folder; copy the file it stands for to its place")


def check_size(path: Path, most_bytes: int | None, *, size: int | None = None) -> None:
    """Raise a CorruptFileError if a file is larger than it may be.

    Args:
        path: the file.
        most_bytes: the bound; None: none.
        size: of the file, in bytes, if it is not at hand.
    """
    found = path.stat().st_size if size is None else size
    if most_bytes is not None and found > most_bytes:
        raise CorruptFileError(f"{path} is damaged: it has {found} bytes, and at most {most_bytes} were written")


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of tensors and their names."""
    return hashlib.sha256(_serialized(tensors)).hexdigest()


def _serialized(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def _json_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
