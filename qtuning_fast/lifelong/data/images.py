"""Images as tensors, opened and processed batch by batch: a data set's pixels need not fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtuning_fast.lifelong.data.encoded import EncodedExamples

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageExamples(EncodedExamples):
    """Examples whose `pixel_values` are made when they are asked for.

    Args:
        files: of the images.
        image_processor: of the base model.
        labels: class indices.
    """

    def __init__(self, files: Sequence[Path], image_processor: Any, labels: Sequence[int]) -> None:
        super().__init__({"labels": torch.tensor(labels)})
        self.files = list(files)
        self.image_processor = image_processor

    def rows(self, chosen: slice) -> dict[str, Tensor]:
        images = [open_image(file) for file in self.files[chosen]]
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels} | super().rows(chosen)


def open_image(file: Path) -> Image:
    """The image in RGB, the right way up.

    Raises:
        ImportError: Pillow is missing.
        FileNotFoundError: there is no such file.
        ValueError: it is no image, not a whole one, or has more than 8 bits a channel.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("images need the package Pillow: pip install pillow") from None
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # made RGB they would be white
                raise ValueError("it has more than 8 bits a channel")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {file}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from None
