"""Packaged images are what the readers take them for; what is missing is named, and no pickle runs code."""

from __future__ import annotations

import gzip
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtuning_fast.lifelong.data import packaged_images
from qtuning_fast.lifelong.data.images import open_image
from qtuning_fast.lifelong.data.packaged_images import animal_silhouettes, clipart


def test_animals_are_silhouettes_with_their_names() -> None:
    images, labels = animal_silhouettes()
    assert Counter(labels) == dict.fromkeys(packaged_images.ANIMALS, 1000)
    horse = np.asarray(open_image(images[labels.index("horse")]))
    assert horse.shape == (28, 28, 3) and horse[0, 0].sum() == 0 and horse.max() > 200
    assert str(images[3]) == "image 3 of animal-mnist"


def test_a_pickle_makes_arrays_and_nothing_else(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'harm'}",)

    for name, content in (("harmful", Harmful()), ("list", [1, 2])):
        (tmp_path / name).write_bytes(gzip.compress(pickle.dumps(content)))
    with pytest.raises(pickle.UnpicklingError, match=r"system is no part of an array"):
        packaged_images._unpickled(tmp_path / "harmful")
    with pytest.raises(ValueError, match="holds a list; it should be an array"):
        packaged_images._unpickled(tmp_path / "list")
    assert not (tmp_path / "harm").exists()


def test_clipart_is_read_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, number in (("birds", 2), ("bugs", 1)):
        for each in range(number):
            file = tmp_path / "animals" / kind / f"{each}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 3)).save(file)
    Image.new("1", (3000, 2000)).save(tmp_path / "animals" / "birds" / "huge.png")
    (tmp_path / "animals" / "birds" / "about.txt").write_text("no drawing")
    monkeypatch.setenv(packaged_images.CLIPART_VARIABLE, str(tmp_path))
    images, labels = clipart("animals", ("bugs", "birds"))
    assert [Path(str(each)).name for each in images] == ["0.png", "0.png", "1.png"]
    assert labels == ["bugs", "birds", "birds"]
    with pytest.raises(FileNotFoundError, match=r"animals/fish; .* apt-get install openclipart-png"):
        clipart("animals", ("fish",))
