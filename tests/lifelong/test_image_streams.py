"""Streams of images load, with sound sizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from qtuning_fast.lifelong.data.image_folders import check_images
from qtuning_fast.lifelong.streams import load_stream
from qtuning_fast.lifelong.tasks import data_digest


def test_animals() -> None:
    tasks = load_stream("animals-5", test_size=20)
    assert [task.name for task in tasks][:2] == ["bear-bird", "cat-cow"]
    for task in tasks:
        assert Counter(task.train.labels) == Counter(task.validation.labels) == {0: 16, 1: 16}
        assert task.holds_images and len({each.content() for each in task.test.inputs}) == 20
    assert load_stream("animals-5", test_size=20) == tasks
    assert data_digest(tasks[0]) != data_digest(tasks[1])


@pytest.mark.skipif(not Path("/usr/share/openclipart/png").is_dir(), reason="openclipart-png is not installed")
def test_clipart() -> None:
    tasks = load_stream("clipart-8", test_size=40)
    assert sum(len(task.label_names) for task in tasks) == 30
    for task in tasks:
        assert set(Counter(task.train.labels).values()) == {16} and set(Counter(task.validation.labels).values()) == {3}
        assert min(Counter(task.test.labels).values()) >= 6 and len(task.test) == 40
        check_images([*task.train.inputs, *task.validation.inputs, *task.test.inputs])
