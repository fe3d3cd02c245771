"""The task that each context (thread or asyncio task) has set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, ref

from qtuning_fast.method.adapter import TaskAdapter
from qtuning_fast.method.prefix import Prefix


@dataclass(eq=False)
class SetTask:
    """A task that is set.

    Attributes:
        name: its name.
        is_live: whether the model computes under the training prefix, which changes with every step.
        adapter: the adapter of a finished task, its head on the model's device; None for the task in training.
        placed: its prefix as it was placed on the layers; None if it is to be made anew.
    """

    name: str
    is_live: bool = False
    adapter: TaskAdapter | None = None
    placed: tuple[Sequence[int], Prefix] | None = field(default=None, repr=False)


def identity(task: SetTask | None) -> tuple[str, bool] | None:
    """Return what is the same for tasks under which a model computes the same."""
    return None if task is None else (task.name, task.is_live)


class _Choice:
    """Stands for what one context has set, and lives as long as the context.

    It does not hold the task: a context never drops a variable, so the task would outlive its model.
    """


class ChosenTasks:
    """The task of each context.

    A thread starts without a choice, an asyncio task with its creator's. A context without one has the task of the
    living contexts, if they agree; if none is left, the task that was set last.

    Attributes:
        last: the task that was set last.
        is_kept: whether a block goes on after which the task of its context will be restored.
    """

    def __init__(self) -> None:
        self._mine: ContextVar[_Choice | None] = ContextVar("qtuning_task", default=None)
        self._choices: list[ref[_Choice]] = []  # replaced, never changed: other threads read it
        self._task_of: WeakKeyDictionary[_Choice, SetTask | None] = WeakKeyDictionary()  # None: the base model alone
        self.last: SetTask | None = None
        self.is_kept = False

    @property
    def mine(self) -> SetTask | None:
        """The task of the calling context.

        Raises:
            RuntimeError: it has set none, and others have set different ones.
        """
        choice = self._mine.get()
        if choice is not None:
            return self._task_of[choice]
        found = {identity(task): task for task in self.living()}
        if not found:
            return self.last
        if len(found) > 1:
            names = ", ".join(sorted(repr(None if task is None else task.name) for task in found.values()))
            raise RuntimeError(
                f"threads or asyncio tasks have set different tasks, {names}, and this one has set none; call set_task "
                "here, or pass task_names"
            )
        return self.last if identity(self.last) in found else next(iter(found.values()))

    def set_mine(self, task: SetTask | None) -> None:
        """Set the task of the calling context; None is the base model alone."""
        choice = _Choice()
        self._task_of[choice] = task
        self._mine.set(choice)
        if not self.is_kept:  # otherwise it is of no concern to other contexts
            self._choices = [ref(each) for each in (*self._living(), choice)]
            self.last = task

    def replace(self, name: str, task: SetTask | None) -> None:
        """Give a task to every context that has set a task of this name."""
        for choice in self._living():
            before = self._task_of[choice]
            if before is not None and before.name == name:
                self._task_of[choice] = task

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the task of the calling context after the block, in which one context at a time may be.

        What is set within it is of the calling context alone, also if it has none of its own.
        """
        choice = self._mine.get()
        before, self.is_kept = self.is_kept, True
        try:
            yield
        finally:
            self._mine.set(choice)
            self.is_kept = before
            del choice  # the traceback of an error would keep it alive

    def living(self, *, but_mine: bool = False) -> list[SetTask | None]:
        """Return what each living context has set, perhaps without the calling one."""
        # No choices themselves: the traceback of an error would keep them alive, as if their contexts still lived.
        mine = self._mine.get() if but_mine else None
        return [self._task_of[choice] for choice in self._living() if choice is not mine]

    def _living(self) -> list[_Choice]:
        return [choice for choice in (each() for each in self._choices) if choice is not None]
