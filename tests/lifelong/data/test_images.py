"""Image files become tensors when they are needed, and unreadable ones are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from qtuning_fast.lifelong.data.images import ImageExamples, open_image
from qtuning_fast.lifelong.tasks import PackedImage


def draw(folder: Path, count: int) -> None:
    """So many different images."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_pixels_are_made_when_they_are_asked_for(tmp_path, monkeypatch):
    draw(tmp_path / "images", 5)
    files = sorted((tmp_path / "images").iterdir())
    opened = []
    monkeypatch.setattr("qtuning_fast.lifelong.data.images.open_image", lambda f: opened.append(f) or open_image(f))
    processor = ViTImageProcessorPil(size={"height": 4, "width": 4})
    images = ImageExamples(files, processor, [0, 1, 0, 1, 0]).with_column("more", torch.arange(5))
    assert len(images) == 5 and not opened
    batches = images.batches(2, torch.device("cpu"))
    first = next(batches)
    assert len(opened) == 2 and first.keys() == {"pixel_values", "more"} and first["pixel_values"].shape == (2, 3, 4, 4)
    rest = list(batches)
    assert [len(batch["more"]) for batch in rest] == [2, 1]
    assert torch.equal(images[3]["pixel_values"], rest[0]["pixel_values"][1]) and images[3]["labels"] == 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    file = tmp_path / "image.png"
    Image.new(mode, (4, 3)).save(file)
    assert open_image(file).mode == "RGB" and open_image(file).size == (4, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(tmp_path: Path, mode: str) -> None:
    file = tmp_path / "image.png"
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    if mode == "P":
        image = image.convert("RGB").quantize(2)
        image.save(file, transparency=image.getpixel((0, 0)))
    else:
        image.convert(mode).save(file)
    left, right = (open_image(file).getpixel((x, 0)) for x in range(2))
    assert left == (255, 255, 255) and right != left


def test_an_image_of_a_collection_is_opened_by_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    Image.new("RGB", (4, 3), "red").save(file)
    packed = [PackedImage("mine", place, lambda place: file.read_bytes() * (1 - place)) for place in range(2)]
    assert open_image(packed[0]).size == (4, 3)
    with pytest.raises(ValueError, match="image 1 of mine cannot be read as an image"):
        open_image(packed[1])


def test_more_than_eight_bits_are_refused(tmp_path):
    file = tmp_path / "scan.png"
    Image.new("I;16", (4, 3)).save(file)
    with pytest.raises(ValueError, match=r"scan\.png cannot be read as an image: it has more than 8 bits per channel"):
        open_image(file)


def test_a_photograph_stands_upright(tmp_path):
    file = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (4, 3)).save(file, exif=exif)
    assert open_image(file).size == (3, 4)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        open_image(tmp_path / "nothing.png")
