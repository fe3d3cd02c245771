"""A stream draws its tasks with its own number of examples, unless another is given."""

from __future__ import annotations

from qtuning_fast.lifelong.stream import Stream, TaskSource


def test_its_own_numbers_and_others() -> None:
    texts = [f"{label} {number}" for label in "ab" for number in range(20)]
    source = TaskSource("letters", "made up", ("a", "b"), lambda: (texts, [text[0] for text in texts]))
    stream = Stream("letters", (source,), shots=5, validation_shots=2)
    [task], [other] = stream.load(), stream.load(shots=3, validation_shots=1, test_size=4, seed=1)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [10, 4, 26]
    assert [len(part) for part in (other.train, other.validation, other.test)] == [6, 2, 4]
    assert task.source == "made up" and task.label_names == ["a", "b"]
