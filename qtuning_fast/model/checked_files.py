"""JSON and tensor files with checksums, replaced atomically.

A file is written beside its destination and moved there, so a killed process leaves either the old file or the new one.
Reading verifies a SHA-256, so a truncated or altered file is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

_CHECKSUM = "checksum"
TEMPORARY = ".part"  # suffix of a file that is still being written


class CorruptFileError(ValueError):
    """A file differs from what was written."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with its checksum."""
    text = json.dumps({**content, _CHECKSUM: _json_digest(content)}, indent=2, allow_nan=False)
    _replace(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that `write_json` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: the file differs from what was written.
    """
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop(_CHECKSUM)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CorruptFileError(f"{path} is damaged: it is not valid JSON") from None
    if checksum != _json_digest(content):
        raise CorruptFileError(f"{path} is damaged: its content does not match its checksum")
    return content


def write_tensors(folder: Path, stem: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write a safetensors file named by its content; return its `file` name and `sha256`, for `read_tensors`.

    Different content has a different name, so the files of an older index stay valid until the new index is in place.
    """
    data = _serialized(tensors)
    digest = hashlib.sha256(data).hexdigest()
    name = f"{stem}-{digest[:12]}.safetensors"
    _replace(folder / name, data)
    return {"file": name, "sha256": digest}


def read_tensors(folder: Path, entry: dict[str, str]) -> dict[str, Tensor]:
    """Read the tensors of an entry that `write_tensors` returned.

    Raises:
        CorruptFileError: the file is missing or differs from what was written.
    """
    name = entry["file"]
    if not isinstance(name, str):
        raise CorruptFileError(f"{folder}: the index names {name!r}, which is not a file name")
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise CorruptFileError(f"{path} is missing, but the index beside it names it")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CorruptFileError(f"{path} is damaged: its content does not match its SHA-256")
    try:
        # Cloned into memory aligned as PyTorch aligns it, because sums in a matrix product may depend on alignment.
        return {name: tensor.clone() for name, tensor in safetensors.load(data).items()}
    except SafetensorError as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from None


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
