"""The lock under which a model computes: what stands on its layers belongs to one computation at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# The block that is open in this context. Asyncio tasks of one thread share its locks; this tells them apart.
_BLOCK: ContextVar[object] = ContextVar("qtuning_block", default=None)


class ComputeLock:
    """A re-entrant lock that also tells asyncio tasks of one thread apart.

    A call holds the lock for its own duration, in which no other asyncio task of the thread runs. A block of the user's
    code holds it longer, and may wait for something in between; nobody else may compute then. Copies and pickles of a
    lock are new locks.

    A `with` statement is left on every error. PyTorch calls no hooks after a KeyboardInterrupt, so leaving a `with`
    statement also leaves what hooks have entered within it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder: int | None = None  # a thread
        self._by_hook: list[bool] = []  # for each time that the holder has entered
        self._block: object = None

    @property
    def is_nested(self) -> bool:
        """Whether the thread that holds the lock holds it for an outer computation too."""
        return len(self._by_hook) > 1

    def __enter__(self) -> None:
        self.enter(by_hook=False)

    def __exit__(self, *_: object) -> None:
        while self._leave():
            pass

    def enter(self, *, by_hook: bool) -> None:
        """Enter the lock; a hook leaves it by `leave_hook`."""
        if not self._lock.acquire(blocking=False):
            if self._block is not None and _BLOCK.get() is self._block:
                raise RuntimeError(
                    "the model computes in a thread that was started within a block (`using` or `evaluating`) of "
                    "another thread, which holds the model; compute in the thread of the block, or close the block"
                )
            self._lock.acquire()
        if self._block is not None and _BLOCK.get() is not self._block:
            self._lock.release()
            raise RuntimeError(
                "another asyncio task of this thread is inside a block (`using` or `evaluating`) of this model; "
                "do not await within such a block, or pass task_names to each call instead"
            )
        self._by_hook.append(by_hook)
        self._holder = threading.get_ident()

    def leave_hook(self) -> None:
        """Leave what a hook entered last; nothing if it failed before."""
        if self._holder == threading.get_ident() and self._by_hook[-1]:
            self._leave()

    def _leave(self) -> bool:
        """Leave what was entered last, and return whether a hook entered it."""
        by_hook = self._by_hook.pop()
        if not self._by_hook:
            self._holder = None
        self._lock.release()
        return by_hook

    @contextmanager
    def as_block(self) -> Iterator[None]:
        """Keep other asyncio tasks of this thread out within the block; the caller holds the lock."""
        if self._block is not None:  # of an outer block
            yield
            return
        self._block = object()
        before = _BLOCK.get()
        _BLOCK.set(self._block)
        try:
            yield
        finally:
            self._block = None
            _BLOCK.set(before)

    @contextmanager
    def recomputing_for(self, thread: int) -> Iterator[None]:
        """Hold the lock while a layer is computed again for a backward pass; `thread` ran the forward pass.

        On a GPU the backward pass runs in a thread of PyTorch's, for which `thread` waits, perhaps within a block. A
        thread that holds the lock without a block computes, while another one runs the backward pass.
        """
        waits = self._block is not None and self._holder == thread != threading.get_ident()
        if torch.compiler.is_dynamo_compiling() or waits:
            yield
            return
        with self:
            yield

    def __reduce__(self) -> tuple[type[ComputeLock], tuple[()]]:
        return ComputeLock, ()
