"""Random crops, flips and brightness of training images.

The crop is Inception's (Szegedy et al. 2015, arXiv 1409.4842): a share of the area and an aspect ratio at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_RATIO = (3 / 4, 4 / 3)
_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image each time that it is read.

    Attributes:
        least_area: the least share of the area that a crop shows.
        brightness: the factor of brightness is drawn from 1 ± this.
    """

    least_area: float
    brightness: float = 0.0

    def __call__(self, image: Image, size: tuple[int, int], draws: np.random.Generator) -> Image:
        """Return a random part of an RGB image, at this width and height, half of the time mirrored."""
        from PIL import Image as Pictures
        from PIL import ImageEnhance, ImageOps

        changed = image.resize(size, Pictures.Resampling.BICUBIC, box=self.box(image.width, image.height, draws))
        if draws.random() < 0.5:
            changed = ImageOps.mirror(changed)
        if self.brightness:
            factor = draws.uniform(1 - self.brightness, 1 + self.brightness)
            changed = ImageEnhance.Brightness(changed).enhance(factor)
        return changed

    def box(self, width: int, height: int, draws: np.random.Generator) -> tuple[int, int, int, int]:
        """Return a random part of an image of this size: left, upper, right and lower end."""
        for _ in range(_TRIES):
            area = draws.uniform(self.least_area, 1) * width * height
            ratio = math.exp(draws.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, upper = (int(draws.integers(room + 1)) for room in (width - w, height - h))
                return left, upper, left + w, upper + h
        # An image that is long and narrow: the middle of it.
        w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
        left, upper = (width - w) // 2, (height - h) // 2
        return left, upper, left + w, upper + h


AUGMENTATIONS = {
    "crops": Augmentation(0.05),
    "crops-brightness": Augmentation(0.08, 63 / 255),
}
"""By name: those of HiDe-Prompt's runs (arXiv 2310.07234) on ImageNet-R and CUB-200, and on CIFAR-100."""


def size_of_pixels(image_processor: Any) -> tuple[int, int]:
    """Return the width and height of what an image processor makes.

    Raises:
        ValueError: it does not say.
    """
    crops = getattr(image_processor, "do_center_crop", False)
    size = image_processor.crop_size if crops else image_processor.size
    width, height = size.get("width"), size.get("height")
    if width is None or height is None:
        raise ValueError(
            f"{type(image_processor).__name__} makes images of different sizes ({dict(size)}), so crops have no size; "
            "leave augment out"
        )
    return int(width), int(height)
