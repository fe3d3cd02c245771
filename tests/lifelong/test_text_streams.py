"""Both streams of texts load, with sound sizes, disjoint splits, and the same tasks in every process."""

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest

from qtuning_fast.lifelong.streams import load_stream

DIGEST = """
import hashlib
from qtuning_fast.lifelong.streams import load_stream
print(hashlib.sha256(repr(load_stream("offline-5")).encode()).hexdigest())
"""


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def fifteen():
    return load_stream("offline-15")


@pytest.mark.parametrize(
    ("name", "tasks", "shots"), [("offline-5", 5, 16), ("offline-5", 5, 100), ("offline-15", 15, 16)]
)
def test_sizes_and_balance(name, tasks, shots):
    stream = load_stream(name, shots=shots)
    assert len(stream) == len({task.name for task in stream}) == tasks
    for task in stream:
        classes = range(len(task.label_names))
        assert len(task.label_names) == len(set(task.label_names)) >= 2
        assert Counter(task.train.labels) == dict.fromkeys(classes, shots)
        assert Counter(task.validation.labels) == dict.fromkeys(classes, 16)
        counts = Counter(task.test.labels)
        if task.name in ("books", "r52"):  # small sets: every text that is left is tested on
            assert len(task.test) == {"books": 76, "r52": 142}[task.name] and min(counts.values()) >= 15
        else:
            assert len(task.test) == 200 and max(counts.values()) - min(counts.values()) <= 1
        assert task.source


def test_no_text_is_in_two_splits(fifteen):
    for task in fifteen:
        texts = [" ".join(text.split()) for part in (task.train, task.validation, task.test) for text in part.inputs]
        assert all(texts) and len(texts) == len(set(texts)), task.name


def test_no_text_is_in_two_tasks(fifteen):
    seen: dict[str, str] = {}
    for task in fifteen:
        for part in (task.train, task.validation, task.test):
            for text in part.inputs:
                assert seen.setdefault(" ".join(text.split()), task.name) == task.name


def test_the_reuters_tasks_share_no_class(fifteen):
    by_name = {task.name: task for task in fifteen}
    assert not set(by_name["r8"].label_names) & set(by_name["r52"].label_names)


def test_label_names(fifteen):
    by_name = {task.name: task for task in fifteen}
    assert by_name["trec"].label_names == ["description", "entity", "human", "location", "number"]
    assert by_name["airlines"].label_names == ["negative", "neutral", "positive"]
    for name in ("amazon", "movies", "nyt", "tweets"):
        assert by_name[name].label_names == ["negative", "positive"]
    for group in ("comp", "rec", "sci", "talk"):
        assert all(label.startswith(f"{group}.") for label in by_name[f"20ng-{group}"].label_names)


def test_a_task_does_not_depend_on_its_stream(fifteen):
    by_name = {task.name: task for task in fifteen}
    assert all(task == by_name[task.name] for task in load_stream("offline-5"))


def test_same_in_every_process():
    here = hashlib.sha256(repr(load_stream("offline-5")).encode()).hexdigest()
    assert [run(DIGEST, PYTHONHASHSEED=hash_seed) for hash_seed in ("1", "2")] == [here, here]


def test_another_seed_draws_other_examples():
    assert all(a.train != b.train for a, b in zip(load_stream("offline-5"), load_stream("offline-5", seed=1)))
