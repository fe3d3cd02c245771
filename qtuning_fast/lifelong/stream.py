"""What a stream is: tasks in the order of learning, and how each of them is drawn from what a source reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qtuning_fast.lifelong.tasks import Labelled, Task, few_shot_split

MINILM, DINOV2 = "all-MiniLM-L6-v2", "facebook/dinov2-small"
"""The base models of texts and of images where the user names none."""


@dataclass(frozen=True)
class TaskSource:
    """How a task is made: what to read, and which classes to draw. Without `read_test`, the test split is cut.

    A language model reads the examples in `template`, and answers with `words`, one for each of `classes`.
    """

    name: str
    source: str
    classes: tuple[str, ...]
    read: Callable[[], Labelled]
    read_test: Callable[[], Labelled] | None = None
    template: str | None = None
    words: tuple[str, ...] | None = None

    def load(self, *, shots: int, validation_shots: int, test_size: int, seed: int) -> Task:
        """Read the examples and draw the task; raises what `load_stream` raises."""
        inputs, labels = self.read()
        task = few_shot_split(
            inputs,
            labels,
            name=self.name,
            shots=shots,
            validation_shots=validation_shots,
            test_size=test_size,
            seed=seed,
            label_names=self.classes,
            test=self.read_test() if self.read_test else None,
            source=self.source,
        )
        return replace(task, template=self.template, label_words=None if self.words is None else list(self.words))


class AnyStream:
    """Tasks in the order of learning, and the settings that suit them.

    Attributes:
        description: what they are.
        queue_size: of the queue of prompts.
        shots, validation_shots, test_size: examples a class, and test examples a task at most, where the user gives no
            other number; no shots: all.
        task_type: see `QTuningConfig`.
    """

    description: str
    queue_size: int
    shots: int | None
    validation_shots: int
    test_size: int
    task_type: str

    def load(
        self,
        *,
        shots: int | None = None,
        validation_shots: int | None = None,
        test_size: int | None = None,
        seed: int = 0,
        data: str | None = None,
    ) -> list[Task]:
        """Draw the tasks in order (`few_shot_split`); see `load_stream`."""
        return self._draw(
            shots=self.shots if shots is None else shots,
            validation_shots=self.validation_shots if validation_shots is None else validation_shots,
            test_size=self.test_size if test_size is None else test_size,
            seed=seed,
            data=data,
        )

    def _draw(
        self, *, shots: int | None, validation_shots: int, test_size: int, seed: int, data: str | None
    ) -> list[Task]:
        raise NotImplementedError


@dataclass(frozen=True)
class Stream(AnyStream):
    """A stream of sources that are at hand.

    Attributes:
        sources: how each task is made.
    """

    description: str
    sources: tuple[TaskSource, ...]
    queue_size: int = 5
    shots: int = 16
    validation_shots: int = 16
    test_size: int = 200
    task_type: str = "sequence-classification"

    def _draw(self, *, data: str | None, **sizes: Any) -> list[Task]:
        if data is not None:
            raise ValueError(f"stream_data is {data!r}, but this stream has data of its own; leave it out")
        return [source.load(**sizes) for source in self.sources]
