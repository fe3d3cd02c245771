"""The picture of training images: a row for each class, and it is part of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qtuning_fast.lifelong.report.page import write_report
from qtuning_fast.lifelong.report.samples import EACH, FILE, SIDE, samples, write_samples
from qtuning_fast.lifelong.tasks import Examples, Task, few_shot_split


def task(name: str, classes: int, folder: Path) -> Task:
    """A task of images of one colour a class, of different sizes."""
    files, labels = [], []
    for label in range(classes):
        for number in range(4):
            files.append(folder / f"{name}-{label}-{number}.png")
            Image.new("RGB", (9, 5 + number), (20 * label, 100, 7)).save(files[-1])
            labels.append(f"${label:02d}$")
    return few_shot_split(files, labels, name=name, shots=2, validation_shots=1, test_size=classes, seed=0)


def test_each_class_has_a_row(tmp_path: Path) -> None:
    figure = samples([task("first", 3, tmp_path), task("second", 2, tmp_path)])
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [r"first:  \$00\$", r"\$01\$", r"\$02\$", r"second:  \$00\$", r"\$01\$"]
    sheet = np.asarray(axes.get_images()[0].get_array())
    assert sheet.shape == (5 * SIDE, EACH * SIDE, 3)
    middle = sheet[SIDE // 2 :: SIDE, SIDE // 2 :: SIDE]
    assert middle[:, 0].tolist() == [[20 * label, 100, 7] for label in (0, 1, 2, 0, 1)]
    assert (middle[:, 2:] == 255).all()  # two shots


def test_many_classes_have_room(tmp_path: Path) -> None:
    figure = samples([task(f"task-{number}", 12, tmp_path) for number in range(5)])
    assert len(figure.axes[0].get_yticks()) == 5 * 8


def test_it_is_in_the_report(tmp_path: Path, make_metrics: Callable[..., Any]) -> None:
    images, texts = task("first", 2, tmp_path), Examples(["a", "b"], [0, 1])
    write_samples([Task("texts", ["a", "b"], texts, texts, texts, "made up")], tmp_path / "texts")
    assert not (tmp_path / "texts").exists()
    write_samples([images], tmp_path / "images")
    page = write_report(make_metrics(2), tmp_path / "images").read_text()
    assert "<h2>Images</h2>" in page and 'alt="Training images of each task"' in page
    before = (tmp_path / "images" / FILE).stat().st_mtime_ns
    write_samples([images], tmp_path / "images")
    assert (tmp_path / "images" / FILE).stat().st_mtime_ns == before
    assert "<h2>Images</h2>" not in write_report(make_metrics(2), tmp_path / "others").read_text()
