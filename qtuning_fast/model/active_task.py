"""Which task a model computes under now, and that task's prefix on the attention layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from qtuning_fast.integrations.transformers import PrefixInjector
from qtuning_fast.method.prefix import Prefix


class ActiveTask:
    """The task that is set. With none, the base model computes by its own attention.

    Args:
        injector: of the base model.
        layers: indices of the layers that get a prefix.
        prefix_of: a task's prefix, by its name and whether the training prefix is to stand in for its own.
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
        """Whether the model computes under the training prefix, which moves with every step."""
        return self._task is not None and self._task[1]

    def set(self, name: str | None, *, live: bool = False) -> None:
        """Compute under this task from here on. An error leaves the one that was set before."""
        if name is None:
            self.forget()
            self._injector.restore()
            return
        with self._undone_by_errors():
            self._task = name, live
            self._injector.switch()
            self.place()

    def forget(self) -> None:
        """No task is set any more; what stands on the layers is for the caller to take off."""
        self._task = None

    def place(self) -> None:
        """Put the task's prefix, as it is now, on the attention layers."""
        assert self._task is not None
        with self._undone_by_errors():
            self._injector.place(self._layers, self._prefix_of(*self._task))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """After the block the task is set that was set before."""
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
