"""Image files as tensors. They are opened batch by batch, so a data set need not fit into memory."""

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
    """Examples whose `pixel_values` are computed on access.

    Args:
        files: the paths of the images.
        image_processor: the base model's image processor.
        labels: the label of each, as `Examples` holds them.
    """

    def __init__(self, files: Sequence[Path], image_processor: Any, labels: Sequence[Any]) -> None:
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


def open_image(file: Path) -> Image:
    """Open an image in RGB, the right way up.

    Raises:
        ImportError: Pillow is missing.
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a complete image, or has more than 8 bits per channel.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("images need the package Pillow: pip install pillow") from None
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # conversion to RGB would make them white
                raise ValueError("it has more than 8 bits per channel")
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {file}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from None
