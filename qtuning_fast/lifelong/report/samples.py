"""Some training images of each class of a run, as one picture beside its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from qtuning_fast.lifelong.data.images import open_image
from qtuning_fast.lifelong.report.plot_style import INK, new_figure
from qtuning_fast.lifelong.tasks import Task

FILE = "samples.png"
"""Its name in the folder of a run."""

EACH, SIDE, MOST_ROWS = 8, 56, 40


def write_samples(tasks: Sequence[Task], folder: Path) -> None:
    """Write `folder/samples.png`, if the tasks are of images and it is not there."""
    if (folder / FILE).exists() or not tasks[0].holds_images:
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{FILE}"
    samples(tasks).savefig(partial, format="png")
    partial.replace(folder / FILE)


def samples(tasks: Sequence[Task]) -> Figure:
    """Return a row of images for each class, of as many classes a task as there is room for."""
    rows = [(task, label) for task in tasks for label in range(min(len(task.label_names), _classes_shown(tasks)))]
    sheet = np.full((len(rows) * SIDE, EACH * SIDE, 3), 255, dtype=np.uint8)
    for row, (task, label) in enumerate(rows):
        chosen = [each for each, its in zip(task.train.inputs, task.train.labels) if its == label][:EACH]
        for column, each in enumerate(chosen):
            y, x = row * SIDE + 2, column * SIDE + 2
            sheet[y : y + SIDE - 4, x : x + SIDE - 4] = np.asarray(_thumbnail(open_image(each)))
    figure, [axes] = new_figure("Training images of each task", height=0.9 + len(rows) * 0.36, width=5.6)
    axes.imshow(sheet, interpolation="none")
    axes.grid(False)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.set_yticks([SIDE * (row + 0.5) for row in range(len(rows))], [_row_name(task, label) for task, label in rows])
    axes.tick_params(axis="y", length=0, labelsize=8, colors=INK)
    return figure


def _classes_shown(tasks: Sequence[Task]) -> int:
    return max(1, MOST_ROWS // len(tasks))


def _row_name(task: Task, label: int) -> str:
    """The class, with the task's name in front of its first one."""
    name, words = task.label_names[label], task.name
    text = f"{words}:  {name}" if label == 0 else name
    return (text if len(text) <= 34 else f"{text[:33]}…").replace("$", r"\$")  # between dollars matplotlib reads TeX


def _thumbnail(image: Image.Image) -> Image.Image:
    return cast(Image.Image, ImageOps.pad(image, (SIDE - 4, SIDE - 4), color="white"))
