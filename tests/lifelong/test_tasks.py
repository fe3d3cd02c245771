"""Splitting: disjoint, balanced, nested, and the same whatever the order of the texts or the process."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtuning_fast.lifelong.tasks import Examples, Task, balanced_counts, few_shot_split
from qtuning_fast.method.labels import MULTI, REGRESSION

SIZES = {"shots": 4, "validation_shots": 3, "test_size": 10}


def made_up(counts: dict[str, int]) -> tuple[list[str], list[str]]:
    texts = [f"{label} text {number}" for label, count in counts.items() for number in range(count)]
    return texts, [label for label, count in counts.items() for _ in range(count)]


def split(texts, labels, **changes) -> Task:
    return few_shot_split(texts, labels, **{"name": "made-up", "seed": 0, **SIZES, **changes})


def normalised(task: Task) -> list[str]:
    return [" ".join(text.split()) for part in (task.train, task.validation, task.test) for text in part.inputs]


def test_sizes_and_labels():
    task = split(*made_up({"b": 30, "a": 20, "c": 40}), source="here")
    assert task.label_names == ["a", "b", "c"] and task.source == "here"
    assert Counter(task.train.labels) == {0: 4, 1: 4, 2: 4}
    assert Counter(task.validation.labels) == {0: 3, 1: 3, 2: 3}
    assert len(task.test) == 10 and set(Counter(task.test.labels).values()) == {3, 4}
    for part in (task.train, task.validation, task.test):
        assert all(text.startswith(task.label_names[label]) for text, label in zip(part.inputs, part.labels))
    assert task.train.labels != sorted(task.train.labels), "the classes are mixed"


@st.composite
def pools(draw) -> list[tuple[str, str]]:
    """Texts of three classes and, among them, some empty, some again in other white space or under another label."""
    texts, labels = made_up({label: draw(st.integers(0, 30)) for label in "xyz"})
    spaces = st.sampled_from([" ", "\t", " \n "])
    again = st.tuples(st.sampled_from([*texts, ""]), st.sampled_from("xyz"), spaces)
    return [
        *zip(texts, labels),
        *((space.join(text.split(" ")), label) for text, label, space in draw(st.lists(again))),
    ]


@given(
    examples=pools(),
    shots=st.none() | st.integers(1, 4),
    validation_shots=st.integers(0, 3),
    test_size=st.integers(1, 30),
    seed=st.integers(0, 3),
    shuffle=st.randoms(use_true_random=False),
)
@settings(max_examples=300, deadline=None)
def test_every_split_is_refused_or_sound(examples, shots, validation_shots, test_size, seed, shuffle):
    sizes = {"shots": shots, "validation_shots": validation_shots, "test_size": test_size, "seed": seed}
    try:
        task = split([text for text, _ in examples], [label for _, label in examples], **sizes)
    except ValueError as error:
        assert "made-up" in str(error)
        return
    read_labels: dict[str, set[str]] = {}
    for text, label in examples:
        read_labels.setdefault(" ".join(text.split()), set()).add(label)
    drawn = normalised(task)
    assert len(drawn) == len(set(drawn)), "no text twice"
    for part in (task.train, task.validation, task.test):
        for text, label in zip(part.inputs, part.labels):
            assert read_labels[" ".join(text.split())] == {task.label_names[label]}
    assert 1 <= len(task.test) <= test_size
    counts = Counter(task.train.labels)
    if shots is None:
        assert all(counts[label] >= 1 for label in range(len(task.label_names)))
    else:
        assert counts == dict.fromkeys(range(len(task.label_names)), shots)
        assert Counter(task.validation.labels) == Counter(dict.fromkeys(counts, validation_shots))
    shuffle.shuffle(examples)
    assert task == split([text for text, _ in examples], [label for _, label in examples], **sizes)


@given(available=st.lists(st.integers(0, 20), min_size=1, max_size=8), total=st.integers(0, 100))
def test_balanced_counts(available, total):
    counts = balanced_counts(available, total)
    assert sum(counts) == min(total, sum(available))
    assert all(0 <= count <= limit for count, limit in zip(counts, available))
    assert all(count >= max(counts) - 1 for count, limit in zip(counts, available) if count < limit)


def test_seed_and_name_decide_the_draw():
    texts, labels = made_up({"a": 50, "b": 50})
    assert split(texts, labels) == split(texts, labels)
    assert split(texts, labels).train != split(texts, labels, seed=1).train
    assert split(texts, labels).train != split(texts, labels, name="other").train


def test_draws_of_more_shots_contain_those_of_fewer():
    texts, labels = made_up({"a": 60, "b": 80})
    few, many = split(texts, labels, shots=4), split(texts, labels, shots=20)
    assert set(few.train.inputs) < set(many.train.inputs)
    assert few.validation == many.validation and few.test == many.test


def test_duplicates_and_ambiguous_texts():
    texts, labels = made_up({"a": 8, "b": 8})
    task = split([*texts, "a  text\n0", "twice", "twice ", "", " "], [*labels, "a", "a", "b", "a", "b"], shots=None)
    assert sorted(normalised(task)) == sorted(texts)


def test_no_shots_takes_what_is_not_held_out():
    task = split(*made_up({"a": 10, "b": 50}), shots=None, validation_shots=16, test_size=200)
    assert Counter(task.validation.labels) == {0: 2, 1: 10}
    assert Counter(task.test.labels) == {0: 2, 1: 10}
    assert Counter(task.train.labels) == {0: 6, 1: 30}


def test_own_splits_are_drawn_from_and_kept_apart():
    texts, labels = made_up({"a": 10, "b": 10})
    task = split(
        texts,
        labels,
        shots=None,
        validation=(["v1", "v2", "a  text 1", "b text 2"], ["a", "b", "a", "b"]),
        test=(["t1", "t2", "a text 0", "b text\t2", "v2"], ["a", "b", "a", "a", "b"]),
    )
    assert set(task.test.inputs) == {"t1", "t2", "a text 0", "b text\t2", "v2"}
    assert set(task.validation.inputs) == {"v1", "a  text 1"}
    assert set(task.train.inputs) == set(texts) - {"a text 0", "a text 1", "b text 2"}


def test_chosen_classes_in_their_order():
    task = split(*made_up({"a": 20, "b": 20, "c": 20}), label_names=["c", "a"])
    assert task.label_names == ["c", "a"]
    assert all(text[0] in "ca" for text in normalised(task))


@pytest.mark.parametrize(
    ("counts", "changes", "message"),
    [
        ({"a": 20, "b": 7}, {}, r"task 'made-up': class 'b' has 7 .* 8 are needed: 4 to train on, 3 to validate, 1 to"),
        ({"a": 20, "b": 2}, {"shots": None}, r"class 'b' has 2 .* 3 are needed"),
        ({"a": 20, "b": 20}, {"label_names": ["a", "b", "c"]}, r"class 'c' has 0 .* 8 are needed"),
        ({"a": 20}, {}, r"task 'made-up': a task needs at least two classes, but it has \['a'\]"),
        ({}, {}, r"task 'made-up': a task needs at least two classes"),
        ({"a": 20, "b": 20}, {"shots": 0}, r"task 'made-up': shots is 0, but must be at least 1"),
        ({"a": 20, "b": 20}, {"validation_shots": -1}, r"validation_shots is -1"),
        ({"a": 20, "b": 20}, {"test_size": 0}, r"test_size is 0"),
        ({"a": 20, "b": 20}, {"test": (["x"], ["c"])}, r"task 'made-up': its test split has no text"),
        ({"a": 20, "b": 20}, {"validation": ([""], ["a"])}, r"task 'made-up': its validation split has no text"),
    ],
)
def test_refused(counts, changes, message):
    with pytest.raises(ValueError, match=message):
        split(*made_up(counts), **changes)


def test_refuses_empty_texts_and_odd_lengths():
    with pytest.raises(ValueError, match="task 'made-up': all of its 2 training texts are empty"):
        split(["", " \n"], ["a", "b"])
    with pytest.raises(ValueError, match="2 texts, but 1 labels"):
        split(["x", "y"], ["a", "b"][:1], label_names=["a", "b"])


DRAWN = {"name": "mine", "shots": 8, "validation_shots": 6, "test_size": 10, "seed": 0}


def test_sizes_count_examples_in_all_where_there_are_no_classes() -> None:
    texts = [f"text {number}" for number in range(40)]
    sets = [("ab", "ac", "b", "")[number % 4] for number in range(40)]
    several = few_shot_split(texts, sets, **DRAWN, problem_type=MULTI)
    assert several.label_names == ["a", "b", "c"] and several.metric == "micro_f1"
    numbers = few_shot_split(texts, list(range(40)), **DRAWN, problem_type=REGRESSION, label_names=["stars"])
    assert numbers.label_names == ["stars"] and numbers.metric == "pearson"
    for task in (several, numbers):
        assert [len(part) for part in (task.train, task.validation, task.test)] == [8, 6, 10]
        drawn = [text for part in (task.train, task.validation, task.test) for text in part.inputs]
        assert len(set(drawn)) == 24
        for part in (task.train, task.validation, task.test):
            for text, label in zip(part.inputs, part.labels):
                number = texts.index(text)
                expected = tuple(int(name in sets[number]) for name in "abc") if task is several else float(number)
                assert label == expected
    more = few_shot_split(texts, sets, **(DRAWN | {"shots": 16}), problem_type=MULTI)
    assert set(several.train.inputs) < set(more.train.inputs)
    assert (several.validation, several.test) == (more.validation, more.test)


def test_one_text_under_two_labels_is_dropped_of_every_kind() -> None:
    texts = [*(f"text {number}" for number in range(30)), "twice", "twice ", "same", " same"]
    sets = [*(("a", "b", "ab")[number % 3] for number in range(30)), "a", "ab", "ab", "ba"]
    task = few_shot_split(texts, sets, **(DRAWN | {"shots": None}), problem_type=MULTI)
    drawn = {" ".join(text.split()) for part in (task.train, task.validation, task.test) for text in part.inputs}
    assert "twice" not in drawn and "same" in drawn and len(drawn) == 31


@pytest.mark.parametrize(
    ("problem_type", "labels", "message"),
    [
        (REGRESSION, [1.0] * 40, "all numbers of its train split are 1.0"),
        (MULTI, ["a", "b"] * 15 + [""] * 10, "no example of its test split has a label"),
        (MULTI, ["a"] * 40, "at least two classes"),
        (MULTI, ["a", "b"] * 5, "it has 10 different texts, but 15 are needed"),
        ("ranking", ["a", "b"] * 20, "problem_type is 'ranking'"),
    ],
)
def test_labels_that_teach_nothing_are_refused(problem_type: str, labels: list, message: str) -> None:
    texts = [f"text {number}" for number in range(len(labels))]
    test = (texts[30:], labels[30:]) if "test split" in message else None
    given = len(labels) if test is None else 30
    with pytest.raises(ValueError, match=message):
        few_shot_split(
            texts[:given], labels[:given], **(DRAWN | {"shots": 5 if test else 8}), problem_type=problem_type, test=test
        )


def test_regression_names_one_number() -> None:
    examples = Examples(["a"], [1.0])
    with pytest.raises(ValueError, match="regression has one number"):
        Task("mine", ["a", "b"], examples, examples, examples, "", problem_type=REGRESSION)
