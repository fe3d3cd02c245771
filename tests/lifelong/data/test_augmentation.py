"""Random crops are what they say: their area, their ratio, mirrored half of the time; and they can be drawn again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from qtuning_fast.lifelong.data.augmentation import AUGMENTATIONS, Augmentation, size_of_pixels
from qtuning_fast.lifelong.data.encoding import ExampleEncoder
from qtuning_fast.lifelong.data.images import ImageExamples


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 9))
def test_a_box_is_within_the_image(width: int, height: int, seed: int) -> None:
    left, upper, right, lower = Augmentation(0.05).box(width, height, np.random.default_rng(seed))
    assert 0 <= left < right <= width and 0 <= upper < lower <= height


def test_areas_and_ratios_are_those_asked_for() -> None:
    draws = np.random.default_rng(0)
    boxes = [Augmentation(0.2).box(400, 300, draws) for _ in range(1000)]
    areas = np.array([(right - left) * (lower - upper) / 120_000 for left, upper, right, lower in boxes])
    ratios = np.array([(right - left) / (lower - upper) for left, upper, right, lower in boxes])
    assert 0.19 < areas.min() < 0.22 and areas.max() > 0.9
    assert 0.73 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.36
    assert len({box[0] for box in boxes}) > 100 and len({box[1] for box in boxes}) > 100


def test_half_of_them_are_mirrored_and_brightness_changes() -> None:
    draws = np.random.default_rng(0)
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[:, 10:] = 100
    image = Image.fromarray(pixels)
    found = [np.asarray(Augmentation(1.0)(image, (8, 8), draws)).astype(int) for _ in range(200)]
    mirrored = [each[:, :4].mean() > each[:, 4:].mean() for each in found]
    assert 70 < sum(mirrored) < 130 and found[0].shape == (8, 8, 3)
    plain = Image.new("RGB", (20, 20), (100, 100, 100))
    bright = [np.asarray(AUGMENTATIONS["crops-brightness"](plain, (4, 4), draws)).mean() for _ in range(200)]
    assert 74 < min(bright) < 80 and 120 < max(bright) < 126


def test_each_epoch_has_its_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(file)
    plain = ImageExamples(files, ViTImageProcessorPil(size={"height": 16, "width": 16}), [0, 1])
    changed, again = (plain.augmented(AUGMENTATIONS["crops"], seed=3) for _ in range(2))
    first = [changed[place]["pixel_values"] for place in (0, 1)]
    assert all(torch.equal(changed[place]["pixel_values"], first[place]) for place in (1, 0))
    assert torch.equal(again.rows(slice(0, 2))["pixel_values"], torch.stack(first))
    changed.begin_epoch(1)
    assert not torch.equal(changed[0]["pixel_values"], first[0])
    changed.begin_epoch(0)
    other = plain.augmented(AUGMENTATIONS["crops"], seed=4)
    assert torch.equal(changed[0]["pixel_values"], first[0])
    assert not torch.equal(other[0]["pixel_values"], first[0])
    assert first[0].shape == plain[0]["pixel_values"].shape == (3, 16, 16)
    assert torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": {"height": 3, "width": 4}}, (4, 3)),
        ({"do_center_crop": True, "crop_size": {"height": 5, "width": 6}, "size": {"shortest_edge": 7}}, (6, 5)),
    ],
)
def test_the_size_is_the_processors(settings: dict[str, Any], expected: tuple[int, int]) -> None:
    assert size_of_pixels(SimpleNamespace(**settings)) == expected


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="makes images of different sizes"):
        size_of_pixels(SimpleNamespace(size={"shortest_edge": 7}))
    with pytest.raises(ValueError, match="augment changes images, but task_type='sequence-classification' reads texts"):
        ExampleEncoder(lambda text: text, "sequence-classification", 8).check_augmentation()
