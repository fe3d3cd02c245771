"""Images as tensors. They are opened batch by batch, so a data set need not fit into memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qtuning_fast.lifelong.data.augmentation import Augmentation, size_of_pixels
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.tasks import Input, PackedImage

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageExamples(EncodedExamples):
    """Examples whose `pixel_values` are computed on access.

    Args:
        files: the images, each the path of a file or a `PackedImage`.
        image_processor: the base model's image processor.
        labels: the label of each, as `Examples` holds them.
    """

    def __init__(self, files: Sequence[Input], image_processor: Any, labels: Sequence[Any]) -> None:
        super().__init__({"labels": torch.tensor(labels)})
        self.files = list(files)
        self.image_processor = image_processor
        self._augmentation: Augmentation | None = None
        self._seed = self._epoch = 0

    def rows(self, chosen: slice) -> dict[str, Tensor]:
        images, given = [open_image(file) for file in self.files[chosen]], dict[str, Any]()
        if self._augmentation is not None:
            size, places = size_of_pixels(self.image_processor), range(*chosen.indices(len(self)))
            images = [self._augmentation(image, size, self._draws(place)) for image, place in zip(images, places)]
            given = {"do_resize": False, "do_center_crop": False}
        pixels = self.image_processor(images=images, return_tensors="pt", **given)["pixel_values"]
        return {"pixel_values": pixels} | super().rows(chosen)

    def augmented(self, augmentation: Augmentation, seed: int) -> ImageExamples:
        """Return the same images, changed at random in another way in each epoch."""
        changed = copy(self)
        changed._augmentation, changed._seed = augmentation, seed
        return changed

    def begin_epoch(self, epoch: int) -> None:
        """Change the images as in this epoch."""
        self._epoch = epoch  # no set_epoch: accelerate would call that, and count from 0 after an interruption

    def _draws(self, place: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self._epoch, place])

    def subset(self, chosen: Sequence[int]) -> ImageExamples:
        part = super().subset(chosen)
        assert isinstance(part, ImageExamples)
        part.files = [self.files[place] for place in chosen]
        return part


def open_image(image: Input) -> Image:
    """Open an image in RGB, the right way up; what is transparent becomes white.

    Args:
        image: the path of a file, or an image of a collection.

    Raises:
        ImportError: Pillow is missing.
        FileNotFoundError: the file does not exist.
        ValueError: it is not a complete image, or has more than 8 bits per channel.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("images need the package Pillow: pip install pillow") from None
    file = io.BytesIO(image.content()) if isinstance(image, PackedImage) else Path(image)
    try:
        with Image.open(file) as opened:
            if opened.mode.startswith(("I", "F")):  # conversion to RGB would make them white
                raise ValueError("it has more than 8 bits per channel")
            return _without_transparency(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {image}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{image} cannot be read as an image: {error}") from None


def _without_transparency(image: Image) -> Image:
    """Put an image on white; conversion to RGB alone shows what is hidden behind transparent pixels, often black."""
    from PIL import Image

    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
