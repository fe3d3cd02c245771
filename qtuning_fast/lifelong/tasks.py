"""Tasks: labelled texts or images in three disjoint splits, and how the splits are drawn.

The examples themselves decide the draw: within a class, they are ordered by a digest of the seed, the task's name and
the text or file content. So the draw is the same in every process and on every machine, whatever the order of the files
and whatever the other tasks.
"""

import json
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from qtuning_fast.lifelong.scores import METRICS
from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE, check_problem_type
from qtuning_fast.model.checked_files import file_digest


@dataclass(frozen=True, order=True)
class PackedImage:
    """An image that has no file of its own.

    Attributes:
        collection: what it is part of.
        place: its number there.
        read: returns the image file's bytes, given the place.
    """

    collection: str
    place: int
    read: Callable[[int], bytes] = field(compare=False, repr=False)

    def content(self) -> bytes:
        """Return the bytes of an image file."""
        return self.read(self.place)

    def __str__(self) -> str:
        return f"image {self.place} of {self.collection}"


Input = str | Path | PackedImage
"""A text, or an image: the path of its file, or where it is packed."""

SPLITS = ("train", "validation", "test")
TEXT_SLOT = "{text}"
"""What stands for the example in a template."""

Label = int | tuple[int, ...] | float
"""The index of a class; or 0 or 1 for each of several classes; or a number."""

GivenLabel = str | Iterable[str] | float
"""The name of a class; or the names of any number of classes; or a number."""

Labelled = tuple[Sequence[Input], Sequence[GivenLabel]]
"""Texts or images, and the label of each."""


@dataclass(frozen=True)
class Examples:
    """Texts or images, and the label of each.

    A label is an index into the task's `label_names`. If the task has several labels an example, it is a 0 or 1 for
    each of them; in regression, a number.
    """

    inputs: Sequence[Input]
    labels: Sequence[Label]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Task:
    """One task of a stream. No text or image occurs twice in it; `source` says where its examples come from.

    A language model answers with `label_words`, one per class, spelled exactly so. None means the names of the classes,
    with spaces in place of underscores and hyphens. It reads `template`, in which `{text}` is the example; None: the
    example alone. `problem_type` says what labels mean, in the words of transformers: one class, several
    (`"multi_label_classification"`), or a number (`"regression"`), whose only label name names it.

    Raises:
        ValueError: there are more or fewer label words than classes, or one is empty; the template has not one
            `{text}`; the problem type is unknown, or regression has several numbers.
    """

    name: str
    label_names: list[str]
    train: Examples
    validation: Examples
    test: Examples
    source: str
    label_words: list[str] | None = None
    problem_type: str = SINGLE
    template: str | None = None

    def __post_init__(self) -> None:
        check_problem_type(self.problem_type)
        check_template(self.name, self.template)
        if self.template == TEXT_SLOT:
            object.__setattr__(self, "template", None)
        if self.problem_type == REGRESSION and len(self.label_names) != 1:
            raise ValueError(
                f"task {self.name!r}: label_names is {self.label_names}; regression has one number an example"
            )
        words = self.label_words
        if words is not None and (len(words) != len(self.label_names) or not all(word.strip() for word in words)):
            raise ValueError(
                f"task {self.name!r}: label_words is {words}; there must be one for each of {self.label_names}"
            )

    @property
    def answers(self) -> list[str]:
        """The word for each class, in order."""
        if self.label_words is not None:
            return list(self.label_words)
        return [" ".join(name.replace("_", " ").replace("-", " ").split()) or name for name in self.label_names]

    @property
    def metric(self) -> str:
        """The name of the measure that tells how well the task is answered (`qtuning_fast.lifelong.scores`)."""
        return METRICS[self.problem_type]

    @property
    def holds_images(self) -> bool:
        return _kind(self.train.inputs) == "images"


def check_template(name: str, template: str | None) -> None:
    """Raise a ValueError if the template of a task has not one place for the example."""
    if template is not None and template.count(TEXT_SLOT) != 1:
        raise ValueError(
            f"task {name!r}: template is {template!r}; it must have {TEXT_SLOT} in it once, in place of the example"
        )


def encoded_labels(labels: Sequence[GivenLabel], label_names: Sequence[str], problem_type: str) -> list[Label]:
    """Return labels as `Examples` holds them.

    Raises:
        ValueError: a class is not among `label_names`.
    """
    kind = _LabelKind.of(problem_type, labels, label_names)
    encoded = [kind.read(label) for label in labels]
    if None in encoded:
        raise ValueError(f"label {labels[encoded.index(None)]!r} is not among {list(label_names)}")
    return [label for label in encoded if label is not None]


def data_digest(task: Task) -> str:
    """A digest of a task's examples. For images, their contents count, not their paths."""
    kind = _kind(task.train.inputs)
    splits = [
        {
            kind: [each if isinstance(each, str) else _content_key(each) for each in split.inputs],
            "labels": list(split.labels),
        }
        for split in (task.train, task.validation, task.test)
    ]
    return sha256(json.dumps([list(task.label_names), splits]).encode()).hexdigest()[:16]


def _kind(inputs: Sequence[Input]) -> str:
    return "images" if inputs and not isinstance(inputs[0], str) else "texts"


def _content_key(each: Input) -> str:
    """Equal for examples that count as one: the text with white space normalised, or a digest of the image's file."""
    if isinstance(each, PackedImage):
        return sha256(each.content()).hexdigest()
    return file_digest(each) if isinstance(each, Path) else " ".join(each.split())


def few_shot_split(
    inputs: Sequence[Input],
    labels: Sequence[GivenLabel],
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
    problem_type: str = SINGLE,
) -> Task:
    """Draw a task from labelled texts or images: so many examples per class, and a balanced test split.

    First, texts that differ only in white space become one, empty texts are dropped, and so are texts with two labels.
    Texts of the test split are removed from the other two splits, and texts of the validation split from the training
    split. The same holds for images; files with the same content count as one.

    Where an example has several labels or a number, there are no classes to draw from: sizes then count examples in
    all.

    The draws are nested: with the same seed, the training examples of fewer `shots` are among those of more, the
    validation examples are the same, and so is the test split if there are enough texts.

    Args:
        inputs, labels: the training texts, or the paths of images, and the label of each: the name of its class, the
            names of its classes, or its number.
        shots: training examples per class; None takes every text that is not held out.
        validation_shots: validation examples per class, or 0. With `shots=None`, at most a fifth of a class.
        test_size: the most test texts in all, spread over the classes as evenly as they allow. With `shots=None`, at
            most a fifth of a class.
        label_names: the classes of the task, in order; texts of other classes are left out. None takes all, sorted.
        validation, test: the source's own splits. Draws from them may be smaller than asked for. A split that is not
            given is cut from `inputs`.
        problem_type: what the labels mean; see `Task`. With regression, `label_names` names the number.

    Raises:
        ValueError: a size is out of range, texts and labels do not pair up, all texts are empty, there are fewer than
            two classes, or a class has too few texts. The message names the class, and how many it has and needs. Or a
            drawn split has nothing to tell its examples apart: no label, or one number only.
    """
    _check_sizes(name, shots, validation_shots, test_size)
    kinds = _LabelKind.of(problem_type, labels, label_names)
    classes, groups = kinds.classes, kinds.groups
    if problem_type != REGRESSION and len(set(classes)) < 2:
        raise ValueError(f"task {name!r}: a task needs at least two classes, but it has {classes}")

    def rank(content: str) -> bytes:
        return sha256(f"{seed}\n{name}\n{content}".encode()).digest()

    kind = _kind(inputs)

    given_test = _Pool(test or ((), ()), kinds, rank)
    given_validation = _Pool(validation or ((), ()), kinds, rank, without=given_test.seen)
    pool = _Pool((inputs, labels), kinds, rank, without=given_validation.seen | given_test.seen)
    if not pool.seen:
        raise ValueError(f"task {name!r}: all of its {len(inputs)} training {kind} are empty")

    to_validate, to_test = _sizes_to_cut(
        name,
        kind if validation is None and test is None else f"{kind} that are in no other split",
        groups,
        pool.sizes,
        shots,
        validation_shots if validation is None else 0,
        test_is_cut=test is None,
    )

    # The test split is cut at the far end, so that it stays the same if more training examples are drawn.
    if test is None:
        test_part = pool.take(balanced_counts(to_test, test_size), at_end=True)
    else:
        test_part = given_test.take(balanced_counts(given_test.sizes, test_size))
    if validation is None:
        validation_part = pool.take(to_validate)
    else:
        validation_part = given_validation.take([validation_shots] * len(groups))
    for split, part, wanted in (("test", test_part, test_size), ("validation", validation_part, validation_shots)):
        if wanted and not part:
            raise ValueError(f"task {name!r}: its {split} split has no {kind} of the classes {classes} left to draw")
    train_part = pool.take(pool.sizes if shots is None else [shots] * len(groups))
    parts = {"train": train_part, "validation": validation_part, "test": test_part}
    _check_labels_differ(name, problem_type, parts)
    return Task(name, classes, train_part, validation_part, test_part, source, problem_type=problem_type)


def balanced_counts(available: Sequence[int], total: int) -> list[int]:
    """How many to take of each class: as even as possible, and at most `total` in all."""
    counts = [0] * len(available)
    for done, label in enumerate(sorted(range(len(available)), key=available.__getitem__)):
        counts[label] = min(available[label], total // (len(available) - done))
        total -= counts[label]
    return counts


@dataclass(frozen=True)
class _LabelKind:
    """What the labels of a task are, and the groups that examples are drawn from evenly.

    Attributes:
        classes: the names of the classes, or of the number.
        groups: what a message calls each group: each class, or all examples as one group.
    """

    problem_type: str
    classes: list[str]
    groups: list[str]

    @classmethod
    def of(cls, problem_type: str, labels: Sequence[Any], label_names: Sequence[str] | None) -> "_LabelKind":
        """Return the kind of these labels; without names, all that occur are the classes."""
        check_problem_type(problem_type)
        if label_names is not None:
            names = list(label_names)
        elif problem_type == REGRESSION:
            names = ["number"]
        else:
            names = sorted(set(labels) if problem_type == SINGLE else {name for each in labels for name in each})
        return cls(problem_type, names, [f"class {name!r}" for name in names] if problem_type == SINGLE else ["it"])

    def read(self, label: Any) -> Label | None:
        """Return a label as `Examples` holds it; None if it has a class that the task lacks."""
        if self.problem_type == REGRESSION:
            return float(label)
        if self.problem_type == SINGLE:
            return self.classes.index(label) if label in self.classes else None
        given = set(label)
        return tuple(int(name in given) for name in self.classes) if given <= set(self.classes) else None

    def group(self, label: Label) -> int:
        """Return the number of the group of a label that was read."""
        return label if self.problem_type == SINGLE and isinstance(label, int) else 0


class _Pool:
    """The distinct examples of one split by group; each group is in the order of the draw."""

    def __init__(
        self, labelled: Labelled, kind: _LabelKind, rank: Callable[[str], bytes], without: Set[str] = frozenset()
    ) -> None:
        inputs, labels = labelled
        if len(inputs) != len(labels):
            raise ValueError(f"there are {len(inputs)} {_kind(inputs)}, but {len(labels)} labels")
        self.rank = rank
        self.input_by_content: dict[str, Any] = {}
        self.label_of: dict[str, Label | None] = {}  # None: it has two labels, or one of another task
        for each, given in zip(inputs, labels):
            key = _content_key(each)
            if key:
                # Of two with the same content the lesser stays, whatever the order of the files.
                self.input_by_content[key] = min(each, self.input_by_content.get(key, each))
                label = kind.read(given)
                self.label_of[key] = label if self.label_of.get(key, label) == label else None
        self.by_group: list[list[str]] = [[] for _ in kind.groups]
        for key, unambiguous in self.label_of.items():
            if unambiguous is not None and key not in without:
                self.by_group[kind.group(unambiguous)].append(key)
        for members in self.by_group:
            members.sort(key=rank)

    @property
    def seen(self) -> Set[str]:
        """The contents of all examples, with those that have two labels or another class."""
        return self.input_by_content.keys()

    @property
    def sizes(self) -> list[int]:
        return [len(members) for members in self.by_group]

    def take(self, counts: Sequence[int], *, at_end: bool = False) -> Examples:
        """Take up to so many examples of each group out of the pool, and mix the groups."""
        taken: list[str] = []
        for members, count in zip(self.by_group, counts):
            part = slice(len(members) - count, None) if at_end else slice(count)
            taken += members[part]
            del members[part]
        taken.sort(key=self.rank)
        labels = [label for key in taken if (label := self.label_of[key]) is not None]
        return Examples([self.input_by_content[key] for key in taken], labels)


def _check_labels_differ(name: str, problem_type: str, parts: dict[str, Examples]) -> None:
    """Raise a ValueError if a split cannot tell a good answer from a bad one, as if its labels were hidden."""
    for split, part in parts.items():
        if problem_type == REGRESSION and len(part) > 1 and len(set(part.labels)) == 1:
            raise ValueError(
                f"task {name!r}: all numbers of its {split} split are {part.labels[0]}; draw more examples if they are "
                "not hidden"
            )
        if problem_type == MULTI and len(part) and not any(any(labels) for labels in part.labels):  # type: ignore[arg-type]
            raise ValueError(
                f"task {name!r}: no example of its {split} split has a label; draw more examples if they are not hidden"
            )


def _check_sizes(name: str, shots: int | None, validation_shots: int, test_size: int) -> None:
    at_least = {"shots": (shots, 1), "validation_shots": (validation_shots, 0), "test_size": (test_size, 1)}
    for argument, (value, least) in at_least.items():
        if value is not None and value < least:
            raise ValueError(f"task {name!r}: {argument} is {value}, but must be at least {least}")


def _sizes_to_cut(
    name: str,
    kind: str,
    groups: Sequence[str],
    sizes: Sequence[int],
    shots: int | None,
    to_validate: int,
    *,
    test_is_cut: bool,
) -> tuple[list[int], list[int]]:
    """For each group, how many examples to cut for validation, and the most that can go to the test split."""
    least_to_validate = to_validate if shots is not None else min(to_validate, 1)
    needed = {"to train on": shots or 1, "to validate": least_to_validate, "to test": int(test_is_cut)}
    for group, size in zip(groups, sizes):
        if size < sum(needed.values()):
            raise ValueError(
                f"task {name!r}: {group} has {size} different {kind}, but {sum(needed.values())} are needed: "
                + ", ".join(f"{count} {purpose}" for purpose, count in needed.items() if count)
            )
    if shots is None:
        fifths = [max(1, size // 5) for size in sizes]
        return [min(to_validate, fifth) for fifth in fifths], fifths
    return [to_validate] * len(sizes), [size - shots - to_validate for size in sizes]
