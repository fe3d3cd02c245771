"""Read real images that install as packages: drawings of Debian's openclipart-png, silhouettes of animal-mnist.

docs/data.md states the origin of each set.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtuning_fast.lifelong.data.image_folders import images_in
from qtuning_fast.lifelong.data.packaged import packaged_file
from qtuning_fast.lifelong.tasks import Labelled, PackedImage

CLIPART_VARIABLE = "QTUNING_FAST_CLIPART"
_CLIPART = "/usr/share/openclipart/png"
_MOST_PIXELS = 4_000_000
_ANIMALS = "animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
"""The labels 0 to 9 of animal-mnist, in the order that its description gives."""


def clipart(group: str, kinds: tuple[str, ...]) -> Labelled:
    """Drawings of the Open Clip Art Library in the folders of these kinds, without folders below them.

    Those of more than four million pixels, of which there are some dozens, are left out: they take seconds to open.

    They are where Debian's package puts them, or in the folder that the environment variable QTUNING_FAST_CLIPART
    names.

    Raises:
        FileNotFoundError: they are not there.
    """
    folder = Path(os.environ.get(CLIPART_VARIABLE) or _CLIPART)
    images: list[Path] = []
    labels: list[str] = []
    for kind in kinds:
        if not (folder / group / kind).is_dir():
            raise FileNotFoundError(
                f"there is no folder {folder / group / kind}; these drawings come with Debian's package "
                f"openclipart-png: apt-get install openclipart-png, or unpack it and set {CLIPART_VARIABLE} to its "
                "folder png"
            )
        files = [file for file in images_in(folder / group / kind) if file.suffix == ".png"]
        found = [file for file in files if _pixels(file) <= _MOST_PIXELS]
        images += found
        labels += [kind] * len(found)
    return images, labels


def _pixels(file: Path) -> int:
    """Return the number of pixels of a PNG file, from its header."""
    with file.open("rb") as opened:
        header = opened.read(24)
    if len(header) < 24 or not header.startswith(b"\x89PNG"):
        raise ValueError(f"{file} is no PNG file")
    width, height = struct.unpack(">II", header[16:])
    return int(width * height)


def animal_silhouettes() -> Labelled:
    """Silhouettes of ten kinds of animals, 28 by 28, of animal-mnist, each with the kind's name."""
    pixels, labels = (_unpickled(packaged_file("animal-mnist", _ANIMALS.format(part))) for part in ("data", "label"))

    def encoded(place: int) -> bytes:
        return _png(pixels[place])

    images = [PackedImage("animal-mnist", place, encoded) for place in range(len(pixels))]
    return images, [ANIMALS[int(label)] for label in labels]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _unpickled(file: Path) -> NDArray[Any]:
    with gzip.open(file) as opened:
        array = _ArrayUnpickler(opened).load()
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{file} holds a {type(array).__name__}; it should be an array")
    return array


class _ArrayUnpickler(pickle.Unpickler):
    """Makes arrays and nothing else: what a pickle names could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
