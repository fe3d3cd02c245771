"""The active task of a model, and its prefix on the attention layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qtuning_fast.integrations.transformers import PrefixInjector
from qtuning_fast.method.prefix import Prefix


class ActiveTask:
    """The active task. Without one, the base model computes with its own attention.

    Args:
        injector: injector of the base model.
        layers: indices of the layers that get a prefix.
        prefix_of: returns a task's prefix, given its name and whether the training prefix replaces its own.
    """

    def __init__(
        self, injector: PrefixInjector, layers: Sequence[int], prefix_of: Callable[[str, bool], Prefix]
    ) -> None:
        self._injector = injector
        self._layers = layers
        self._prefix_of = prefix_of
        self._task: tuple[str, bool] | None = None

    @property
    def name(self) -> str | None:
        return None if self._task is None else self._task[0]

    @property
    def is_live(self) -> bool:
        """Whether the model computes under the training prefix, which changes with every step."""
        return self._task is not None and self._task[1]

    def set(self, name: str | None, *, live: bool = False) -> None:
        """Activate a task. On an error the previous task stays active."""
        if name is None:
            self.forget()
            self._injector.restore()
            return
        with self._undone_by_errors():
            self._task = name, live
            self._injector.switch()
            self.place()

    def forget(self) -> None:
        """Deactivate the task; the caller removes the prefix from the layers."""
        self._task = None

    def place(self) -> None:
        """Place the task's current prefix on the attention layers."""
        assert self._task is not None
        with self._undone_by_errors():
            self._injector.place(self._layers, self._prefix_of(*self._task))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the active task after the block."""
        task = self._task
        try:
            with self._injector.keeping():
                yield
        finally:
            self._task = task

    @contextmanager
    def _undone_by_errors(self) -> Iterator[None]:
        task, placed = self._task, self._injector.placed
        try:
            yield
        except BaseException:
            self._task = task
            self._injector.put_back(placed)
            raise
