"""A task: labelled texts in three disjoint splits, and how they are drawn from a pool of texts.

A draw is decided by the texts themselves: within a class they are ordered by a digest of seed, task name and text.
So it is the same in every process and on every machine, whatever the order of the files and of the other tasks.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from hashlib import sha256

Labelled = tuple[Sequence[str], Sequence[str]]
"""Texts, and the name of the class of each."""


@dataclass(frozen=True)
class Examples:
    """Texts, and the class of each as an index into the task's `label_names`."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """One task of a stream. No text occurs twice in it; `source` says where its texts come from."""

    name: str
    label_names: list[str]
    train: Examples
    validation: Examples
    test: Examples
    source: str


def few_shot_split(
    texts: Sequence[str],
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
    validation split leaves the training texts.

    The draws are nested: with the same seed, the training examples of fewer `shots` are among those of more, the
    validation examples are the same, and so is the test set where texts are plentiful.

    Args:
        texts, labels: the training texts and the class of each, by name.
        shots: training examples a class; None takes every text that is not held out.
        validation_shots: validation examples a class (0: none). With `shots=None`, at most a fifth of a class.
        test_size: at most so many test texts in all, spread over the classes as evenly as these allow. With
            `shots=None`, at most a fifth of a class.
        label_names: the classes of the task, in order; texts of other classes are left out. None: all, sorted.
        validation, test: the source's own splits. What is drawn from them is at most as large, but may be smaller;
            a split that is not given is cut from `texts`.

    Raises:
        ValueError: a size out of range, texts and labels that do not pair up, no text that is not empty, fewer than
            two classes, or a class with too few texts: named, with how many there are and how many are needed.
    """
    _check_sizes(name, shots, validation_shots, test_size)
    classes = sorted(set(labels)) if label_names is None else list(label_names)
    if len(set(classes)) < 2:
        raise ValueError(f"task {name!r}: a task needs at least two classes, but it has {classes}")

    def rank(text: str) -> bytes:
        return sha256(f"{seed}\n{name}\n{text}".encode()).digest()

    own_test = _Pool(test or ((), ()), classes, rank)
    own_validation = _Pool(validation or ((), ()), classes, rank, without=own_test.seen)
    pool = _Pool((texts, labels), classes, rank, without=own_validation.seen | own_test.seen)
    if not pool.seen:
        raise ValueError(f"task {name!r}: none of its {len(texts)} training texts holds anything")

    to_validate, to_test = _sizes_to_cut(
        name, classes, pool.sizes, shots, validation_shots if validation is None else 0, test_is_cut=test is None
    )

    # A test set is cut at the far end, where it stays the same when more examples are asked for at the near one.
    if test is None:
        test_part = pool.take(balanced_counts(to_test, test_size), at_end=True)
    else:
        test_part = own_test.take(balanced_counts(own_test.sizes, test_size))
    if validation is None:
        validation_part = pool.take(to_validate)
    else:
        validation_part = own_validation.take([validation_shots] * len(classes))
    for split, part, wanted in (("test", test_part, test_size), ("validation", validation_part, validation_shots)):
        if wanted and not part:
            raise ValueError(f"task {name!r}: its {split} split has no text of the classes {classes} left to draw")
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
    """The different texts of one split, by class, each class in the order in which it is drawn."""

    def __init__(
        self, labelled: Labelled, classes: Sequence[str], rank: Callable[[str], bytes], without: Set[str] = frozenset()
    ) -> None:
        texts, labels = labelled
        if len(texts) != len(labels):
            raise ValueError(f"there are {len(texts)} texts, but {len(labels)} labels")
        self.rank = rank
        self.written: dict[str, str] = {}  # by the text with its white space normalised
        label_of: dict[str, str | None] = {}  # None: it occurs under two labels
        for text, label in zip(texts, labels):
            key = " ".join(text.split())
            if key:
                # Of two that differ in white space the lesser stays, so that the order of the files means nothing.
                self.written[key] = min(text, self.written.get(key, text))
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
        """All its texts, those under two labels or of other classes too."""
        return self.written.keys()

    @property
    def sizes(self) -> list[int]:
        return [len(members) for members in self.by_class]

    def take(self, counts: Sequence[int], *, at_end: bool = False) -> Examples:
        """Take so many texts of each class out of the pool, fewer where there are fewer, the classes mixed."""
        taken: list[tuple[str, int]] = []
        for label, (members, count) in enumerate(zip(self.by_class, counts)):
            part = slice(len(members) - count, None) if at_end else slice(count)
            taken += [(key, label) for key in members[part]]
            del members[part]
        taken.sort(key=lambda example: self.rank(example[0]))
        return Examples([self.written[key] for key, _ in taken], [label for _, label in taken])


def _check_sizes(name: str, shots: int | None, validation_shots: int, test_size: int) -> None:
    at_least = {"shots": (shots, 1), "validation_shots": (validation_shots, 0), "test_size": (test_size, 1)}
    for argument, (value, least) in at_least.items():
        if value is not None and value < least:
            raise ValueError(f"task {name!r}: {argument} is {value}, but must be at least {least}")


def _sizes_to_cut(
    name: str, classes: Sequence[str], sizes: Sequence[int], shots: int | None, to_validate: int, *, test_is_cut: bool
) -> tuple[list[int], list[int]]:
    """Of each class, how many texts to cut for validation, and how many can go to the test set at most."""
    least_to_validate = to_validate if shots is not None else min(to_validate, 1)
    needed = {"to train on": shots or 1, "to validate": least_to_validate, "to test": int(test_is_cut)}
    for label, size in zip(classes, sizes):
        if size < sum(needed.values()):
            raise ValueError(
                f"task {name!r}: class {label!r} has {size} different texts, but {sum(needed.values())} are needed: "
                + ", ".join(f"{count} {purpose}" for purpose, count in needed.items() if count)
            )
    if shots is None:
        fifths = [max(1, size // 5) for size in sizes]
        return [min(to_validate, fifth) for fifth in fifths], fifths
    return [to_validate] * len(sizes), [size - shots - to_validate for size in sizes]
