"""Files that are whole or refused: JSON and tensors with checksums, replaced in one step.

A file is written beside its place and moved there, so a process that is killed leaves the old file or the new one.
What is read is checked against a SHA-256, so a truncated or altered file is an error and never read as good.
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
TEMPORARY = ".part"  # ending of a file that is not whole yet


class CorruptFileError(ValueError):
    """A file is not what was written."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with a checksum of itself."""
    text = json.dumps({**content, _CHECKSUM: _json_digest(content)}, indent=2, allow_nan=False)
    _replace(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: the file is not what was written.
    """
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop(_CHECKSUM)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CorruptFileError(f"{path} is damaged: it is not the JSON that was written") from None
    if checksum != _json_digest(content):
        raise CorruptFileError(f"{path} is damaged: its content does not match its checksum")
    return content


def write_tensors(folder: Path, stem: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write a safetensors file named after its content; returns its `file` name and `sha256`, for `read_tensors`.

    A name that says what is inside is never written twice with different content, so the files of an older index stay
    valid until the new index is in place.
    """
    data = _serialized(tensors)
    digest = hashlib.sha256(data).hexdigest()
    name = f"{stem}-{digest[:12]}.safetensors"
    _replace(folder / name, data)
    return {"file": name, "sha256": digest}


def read_tensors(folder: Path, entry: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of an entry that `write_tensors` returned.

    Raises:
        CorruptFileError: the file is missing or not what was written.
    """
    name = entry["file"]
    if not isinstance(name, str):
        raise CorruptFileError(f"{folder}: the index names {name!r}, which is no file name")
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise CorruptFileError(f"{path} is missing, though the index beside it names it")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CorruptFileError(f"{path} is damaged: its content does not match its SHA-256")
    try:
        # Cloned: memory aligned as PyTorch aligns it, for sums in a matrix product may depend on that.
        return {name: tensor.clone() for name, tensor in safetensors.load(data).items()}
    except SafetensorError as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from None


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors, names and all."""
    return hashlib.sha256(_serialized(tensors)).hexdigest()


def _serialized(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
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
