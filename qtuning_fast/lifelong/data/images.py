"""Images as tensors. They are opened batch by batch, so a data set need not fit into memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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

    def rows(self, chosen: slice) -> dict[str, Tensor]:
        images = [open_image(file) for file in self.files[chosen]]
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels} | super().rows(chosen)

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
