"""The active task of the calling context (thread or asyncio task), and its prefix on the attention layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from qtuning_fast.attention.common import constant
from qtuning_fast.integrations.transformers import PrefixInjector
from qtuning_fast.method.adapter import TaskAdapter
from qtuning_fast.method.prefix import Prefix
from qtuning_fast.model.chosen_tasks import ChosenTasks, SetTask, identity

Result = TypeVar("Result")

_COMPILED: set[str] = set()  # the keys of the active tasks whose model was compiled
_KEYS = map(str, itertools.count())

_COMPILED_FOR = (
    "the model was compiled, and compiled calls compute under one task at a time, because they take no lock: another "
    "thread or asyncio task has set {}; set the same task everywhere, or compile one model for each thread"
)
_IN_A_BLOCK = (
    "set_task is called while a batch of several tasks computes (`using`, or a call with task_names), which would go "
    "on under the task that is set; call it before or after, or pass task_names to the inner call"
)
_HOOKED = (
    "the base model cannot be copied or pickled by itself while a task is set; copy or pickle the QTuningModel, or "
    "call set_task(None) or detach() first"
)


class ActiveTask:
    """The active task. Without one, the base model computes with its own attention.

    Each context sets its own (`ChosenTasks`). The layers hold the task of one computation at a time, under the
    injector's lock. `with active:` enters a computation: it puts the task of the calling context on the layers, unless
    it stands there already or an outer computation goes on.

    Args:
        injector: injector of the base model.
        layers: indices of the layers that get a prefix.
        prefix_of: returns a task's current prefix.

    Attributes:
        current: the task on the layers; within a computation that of its context.
    """

    def __init__(self, injector: PrefixInjector, layers: Sequence[int], prefix_of: Callable[[SetTask], Prefix]) -> None:
        self._injector = injector
        self._layers = layers
        self._prefix_of = prefix_of
        self._hooks: list[RemovableHandle] = []
        self._reset()

    def _reset(self) -> None:
        self._key = next(_KEYS)
        self._chosen = ChosenTasks()
        self._is_chosen_here = False  # whether a block decides what stands on the layers, instead of the context
        self.current: SetTask | None = None

    # The task of a context

    @property
    def name(self) -> str | None:
        """The name of `task`."""
        task = self.task
        return None if task is None else task.name

    @property
    def task(self) -> SetTask | None:
        """The task of the calling context.

        Raises:
            RuntimeError: it has set none, and others have set different ones.
        """
        return self._chosen.mine

    def is_set_anywhere(self, name: str) -> bool:
        """Return whether a living context has set this task, or a new context would get it."""
        return any(task is not None and task.name == name for task in self._chosen.living() or [self._chosen.last])

    def set(self, name: str | None, *, live: bool = False, adapter: TaskAdapter | None = None) -> None:
        """Activate a task for the calling context. On an error the previous task stays active.

        Raises:
            RuntimeError: a block computes under several tasks, or compiled code under another one.
        """
        with self._injector.lock:
            if self._is_chosen_here and not self._chosen.is_kept:
                raise RuntimeError(_IN_A_BLOCK)
            task = None if name is None else SetTask(name, live, adapter)
            self._check_not_compiled_for_others(identity(task))
            if task is not None:
                self._add_hooks()
            self._put(task)
            self._chosen.set_mine(task)
            self._follow_tasks()

    def set_for_all(self, name: str) -> None:
        """Give the current task to every context that has set a task of this name."""
        self._chosen.replace(name, self.current)

    def forget(self) -> None:
        """Deactivate the task in all contexts; the caller removes the prefix from the layers."""
        self.remove_hooks()
        self._reset()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the active task after the block, within which no one else computes."""
        with self._injector.lock:
            current = self.current
            try:
                with self._chosen.kept(), self._injector.keeping(), self._choosing():
                    yield
            finally:
                self.current = current
                self._follow_tasks()

    @contextmanager
    def off_the_layers(self) -> Iterator[SetTask | None]:
        """Restore the base model within the block, for a copy, and yield the task of the calling context."""
        with self._injector.lock, self._injector.keeping():
            self._injector.restore()
            yield self.task

    # What stands on the layers

    def compute(self, run: Callable[..., Result], *args: Any) -> Result:
        """Call a function as a computation. Compiled code takes no lock: it computes under what is on the layers."""
        if torch.compiler.is_dynamo_compiling():
            self.note_compiled()
            return run(*args)
        with self:
            return run(*args)

    def note_compiled(self) -> None:
        """Remember, while the compiler traces the model, that compiled code computes under this active task."""
        _note_compiled(self._key)

    def __enter__(self) -> None:
        self._injector.lock.__enter__()
        self._prepare(leave=self._injector.lock.__exit__)

    def __exit__(self, *_: object) -> None:
        self._injector.lock.__exit__()

    def enter_hook(self) -> None:
        """Enter a computation that `leave_hook` leaves."""
        lock = self._injector.lock
        lock.enter(by_hook=True)
        self._prepare(leave=lock.leave_hook)
        if not self._hooks:  # removed while this call waited for the lock, so no hook will leave it
            lock.leave_hook()

    def leave_hook(self) -> None:
        self._injector.lock.leave_hook()

    def _prepare(self, *, leave: Callable[[], None]) -> None:
        """Put the task of the calling context on the layers; on an error leave the lock."""
        try:
            if not self._is_chosen_here:
                task = self.task
                if task is not self.current:
                    self._check_not_compiled_for_others(identity(task))
                    self._put(task)
            if not self._injector.lock.is_nested:
                self._injector.follow_checkpointing()
        except BaseException:
            leave()
            raise

    @contextmanager
    def block(self) -> Iterator[None]:
        """Keep others from computing within a block of the user's code."""
        with self._injector.lock, self._injector.lock.as_block():
            yield

    @contextmanager
    def mixed(self) -> Iterator[None]:
        """The same for a block in which the caller replaces what stands on the layers, and puts it back."""
        with self.block(), self._choosing():
            self._check_not_compiled_for_others(())
            self._injector.follow_checkpointing()
            self._add_hooks()
            yield

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        """Leave what stands on the layers to the code in the block, which holds the lock."""
        before, self._is_chosen_here = self._is_chosen_here, True
        try:
            yield
        finally:
            self._is_chosen_here = before

    def place(self) -> None:
        """Place the current task's current prefix on the attention layers."""
        assert self.current is not None
        with self._undone_by_errors():
            self._injector.place(self._layers, self._prefix_of(self.current))

    def place_again(self) -> None:
        """Make every task's prefix anew, since the model has moved."""
        for task in (self.current, self._chosen.last, *self._chosen.living()):
            if task is not None:
                task.placed = None
        if self.current is not None:
            self._put(self.current)

    def _put(self, task: SetTask | None) -> None:
        """Put a task's prefix on the layers, or restore the model's own attention."""
        if task is None:
            self._injector.restore()
        elif task.placed is not None:
            self._injector.put_back(task.placed)
        else:
            with self._undone_by_errors(), self._choosing():
                self._injector.switch()
                self._injector.place(self._layers, self._prefix_of(task))
            if not task.is_live:
                task.placed = self._injector.placed
        self.current = task

    @contextmanager
    def _undone_by_errors(self) -> Iterator[None]:
        placed = self._injector.placed
        try:
            yield
        except BaseException:
            self._injector.put_back(placed)
            raise

    def _check_not_compiled_for_others(self, mine: tuple[Any, ...] | None) -> None:
        """Raise a RuntimeError if compiled code may run under another context's task, which would be replaced.

        Args:
            mine: the `identity` of the task to be put on the layers; () for those of several tasks.
        """
        if self._key not in _COMPILED:
            return
        for task in self._chosen.living(but_mine=True):
            if identity(task) != mine:
                raise RuntimeError(_COMPILED_FOR.format("no task" if task is None else f"task {task.name!r}"))

    # Direct calls of the base model

    def _follow_tasks(self) -> None:
        """Make direct calls of the base model computations too while a task is set."""
        if self.current is not None or any(task is not None for task in self._chosen.living()):
            self._add_hooks()
        elif not self._is_chosen_here:
            self.remove_hooks()

    def _add_hooks(self) -> None:
        if not self._hooks:
            calls = _DirectCalls(self)
            self._hooks = self._injector.add_hooks(calls.enter, calls.leave)

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # Contexts and locks are neither copied nor pickled.

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_injector", "_layers", "_prefix_of", "_hooks")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


@constant
def _note_compiled(key: str) -> bool:
    """A constant, so that the compiler calls it when it traces the model, and never again; exported code needs none."""
    if not torch.compiler.is_exporting():
        _COMPILED.add(key)
    return True


class _DirectCalls:
    """Hooks that make each direct call of the base model, or of its encoder, a computation of the calling context."""

    def __init__(self, active: ActiveTask) -> None:
        self._active = active

    def enter(self, *_: object) -> None:
        if torch.compiler.is_dynamo_compiling():
            self._active.note_compiled()
            return
        self._active.enter_hook()

    def leave(self, *_: object) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self._active.leave_hook()

    def __deepcopy__(self, memo: dict[int, Any]) -> _DirectCalls:
        active = memo.get(id(self._active))  # there only if the whole is copied
        if active is None:
            raise RuntimeError(_HOOKED)
        return _DirectCalls(active)

    def __reduce__(self) -> str:
        raise RuntimeError(_HOOKED)
