"""A task: labelled texts or images in three disjoint splits, and how they are drawn from a pool.

A draw is decided by the examples themselves: within a class they are ordered by a digest of seed, task name and text
or file content. So it is the same in every process and on every machine, whatever the order of the files and of the
other tasks.
"""

import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from qtuning_fast.model.checked_files import file_digest

Input = str | Path
"""A text, or the path of an image file."""

SPLITS = ("train", "validation", "test")

Labelled = tuple[Sequence[Input], Sequence[str]]
"""Texts or images, and the name of the class of each."""


@dataclass(frozen=True)
class Examples:
    """Texts or images, and the class of each as an index into the task's `label_names`."""

    inputs: Sequence[Input]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Task:
    """One task of a stream. No text or image occurs twice in it; `source` says where its examples come from.

    Where a language model answers, `label_words` are its answers, one a class; None for the names of the classes with
    spaces for underscores and hyphens. They are used as they are written, upper and lower case too.

    Raises:
        ValueError: there is not one label word a class, or one is empty.
    """

    name: str
    label_names: list[str]
    train: Examples
    validation: Examples
    test: Examples
    source: str
    label_words: list[str] | None = None

    def __post_init__(self) -> None:
        words = self.label_words
        if words is not None and (len(words) != len(self.label_names) or not all(word.strip() for word in words)):
            raise ValueError(
                f"task {self.name!r}: label_words is {words}; there must be one for each of {self.label_names}"
            )

    @property
    def answers(self) -> list[str]:
        """The words for the classes, in their order."""
        if self.label_words is not None:
            return list(self.label_words)
        return [" ".join(name.replace("_", " ").replace("-", " ").split()) or name for name in self.label_names]

    @property
    def holds_images(self) -> bool:
        return _kind(self.train.inputs) == "images"


def data_digest(task: Task) -> str:
    """A hash that tells whether a task's examples are the same; of images the contents count, not where they are."""
    kind = _kind(task.train.inputs)
    splits = [
        {
            kind: [_content_key(each) if isinstance(each, Path) else each for each in split.inputs],
            "labels": split.labels,
        }
        for split in (task.train, task.validation, task.test)
    ]
    return sha256(json.dumps([list(task.label_names), splits]).encode()).hexdigest()[:16]


def _kind(inputs: Sequence[Input]) -> str:
    return "images" if inputs and isinstance(inputs[0], Path) else "texts"


def _content_key(each: Input) -> str:
    """What makes an example the same as another: its text with white space normalised, or a digest of the file."""
    return file_digest(each) if isinstance(each, Path) else " ".join(each.split())


def few_shot_split(
    inputs: Sequence[Input],
    labels: Sequence[str],
    *,
    name: str,
    shots: int | None,
    validation_shots: int,
    test_size: int,
    seed: int,
    label_names: Sequence[str] | None = None,
    validation: Labelled | None = None,
    test: Labelled | None = None,
    source: str = "",
) -> Task:
    """Draw a task from labelled texts: so many training and validation examples a class, and a balanced test set.

    Before anything is drawn, texts that differ in white space alone become one, empty ones are dropped, and one that
    occurs under two labels is dropped altogether. A text of the test split leaves the other two, one of the
    validation split leaves the training texts. With images it is the same, and files of the same content are one.

    The draws are nested: with the same seed, the training examples of fewer `shots` are among those of more, the
    validation examples are the same, and so is the test set where texts are plentiful.

    Args:
        inputs, labels: the training texts, or paths of image files, and the class of each, by name.
        shots: training examples a class; None takes every text that is not held out.
        validation_shots: validation examples a class (0: none). With `shots=None`, at most a fifth of a class.
        test_size: at most so many test texts in all, spread over the classes as evenly as these allow. With
            `shots=None`, at most a fifth of a class.
        label_names: the classes of the task, in order; texts of other classes are left out. None: all, sorted.
        validation, test: the source's own splits. What is drawn from them is at most as large, but may be smaller;
            a split that is not given is cut from `inputs`.

    Raises:
        ValueError: a size out of range, texts and labels that do not pair up, no text that is not empty, fewer than
            two classes, or a class with too few texts: named, with how many there are and how many are needed.
    """
    _check_sizes(name, shots, validation_shots, test_size)
    classes = sorted(set(labels)) if label_names is None else list(label_names)
    if len(set(classes)) < 2:
        raise ValueError(f"task {name!r}: a task needs at least two classes, but it has {classes}")

    def rank(content: str) -> bytes:
        return sha256(f"{seed}\n{name}\n{content}".encode()).digest()

    kind = _kind(inputs)

    given_test = _Pool(test or ((), ()), classes, rank)
    given_validation = _Pool(validation or ((), ()), classes, rank, without=given_test.seen)
    pool = _Pool((inputs, labels), classes, rank, without=given_validation.seen | given_test.seen)
    if not pool.seen:
        raise ValueError(f"task {name!r}: none of its {len(inputs)} training {kind} holds anything")

    to_validate, to_test = _sizes_to_cut(
        name,
        kind if validation is None and test is None else f"{kind} that are in no other split",
        classes,
        pool.sizes,
        shots,
        validation_shots if validation is None else 0,
        test_is_cut=test is None,
    )

    # A test set is cut at the far end, where it stays the same when more examples are asked for at the near one.
    if test is None:
        test_part = pool.take(balanced_counts(to_test, test_size), at_end=True)
    else:
        test_part = given_test.take(balanced_counts(given_test.sizes, test_size))
    if validation is None:
        validation_part = pool.take(to_validate)
    else:
        validation_part = given_validation.take([validation_shots] * len(classes))
    for split, part, wanted in (("test", test_part, test_size), ("validation", validation_part, validation_shots)):
        if wanted and not part:
            raise ValueError(f"task {name!r}: its {split} split has no {kind} of the classes {classes} left to draw")
    train_part = pool.take(pool.sizes if shots is None else [shots] * len(classes))
    return Task(name, classes, train_part, validation_part, test_part, source)


def balanced_counts(available: Sequence[int], total: int) -> list[int]:
    """How many to take of each class so that the counts are as even as they can be and sum to at most `total`."""
    counts = [0] * len(available)
    for done, label in enumerate(sorted(range(len(available)), key=available.__getitem__)):
        counts[label] = min(available[label], total // (len(available) - done))
        total -= counts[label]
    return counts


class _Pool:
    """The different examples of one split, by class, each class in the order in which it is drawn."""

    def __init__(
        self, labelled: Labelled, classes: Sequence[str], rank: Callable[[str], bytes], without: Set[str] = frozenset()
    ) -> None:
        inputs, labels = labelled
        if len(inputs) != len(labels):
            raise ValueError(f"there are {len(inputs)} {_kind(inputs)}, but {len(labels)} labels")
        self.rank = rank
        self.input_by_content: dict[str, Any] = {}
        label_of: dict[str, str | None] = {}  # None: it occurs under two labels
        for each, label in zip(inputs, labels):
            key = _content_key(each)
            if key:
                # Of two with the same content the lesser stays, so that the order of the files means nothing.
                self.input_by_content[key] = min(each, self.input_by_content.get(key, each))
                label_of[key] = label if label_of.get(key, label) == label else None
        self.by_class: list[list[str]] = [[] for _ in classes]
        index = {label: number for number, label in enumerate(classes)}
        for key, unambiguous in label_of.items():
            if unambiguous in index and key not in without:
                self.by_class[index[unambiguous]].append(key)
        for members in self.by_class:
            members.sort(key=rank)

    @property
    def seen(self) -> Set[str]:
        """The contents of all its examples, those under two labels or of other classes too."""
        return self.input_by_content.keys()

    @property
    def sizes(self) -> list[int]:
        return [len(members) for members in self.by_class]

    def take(self, counts: Sequence[int], *, at_end: bool = False) -> Examples:
        """Take so many examples of each class out of the pool, fewer where there are fewer, the classes mixed."""
        taken: list[tuple[str, int]] = []
        for label, (members, count) in enumerate(zip(self.by_class, counts)):
            part = slice(len(members) - count, None) if at_end else slice(count)
            taken += [(key, label) for key in members[part]]
            del members[part]
        taken.sort(key=lambda example: self.rank(example[0]))
        return Examples([self.input_by_content[key] for key, _ in taken], [label for _, label in taken])


def _check_sizes(name: str, shots: int | None, validation_shots: int, test_size: int) -> None:
    at_least = {"shots": (shots, 1), "validation_shots": (validation_shots, 0), "test_size": (test_size, 1)}
    for argument, (value, least) in at_least.items():
        if value is not None and value < least:
            raise ValueError(f"task {name!r}: {argument} is {value}, but must be at least {least}")


def _sizes_to_cut(
    name: str,
    kind: str,
    classes: Sequence[str],
    sizes: Sequence[int],
    shots: int | None,
    to_validate: int,
    *,
    test_is_cut: bool,
) -> tuple[list[int], list[int]]:
    """Of each class, how many examples to cut for validation, and how many can go to the test set at most."""
    least_to_validate = to_validate if shots is not None else min(to_validate, 1)
    needed = {"to train on": shots or 1, "to validate": least_to_validate, "to test": int(test_is_cut)}
    for label, size in zip(classes, sizes):
        if size < sum(needed.values()):
            raise ValueError(
                f"task {name!r}: class {label!r} has {size} different {kind}, but {sum(needed.values())} are needed: "
                + ", ".join(f"{count} {purpose}" for purpose, count in needed.items() if count)
            )
    if shots is None:
        fifths = [max(1, size // 5) for size in sizes]
        return [min(to_validate, fifth) for fifth in fifths], fifths
    return [to_validate] * len(sizes), [size - shots - to_validate for size in sizes]
