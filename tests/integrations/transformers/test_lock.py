"""The lock under which a model computes."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest

from qtuning_fast.integrations.transformers.lock import ComputeLock


def in_thread(run: Callable[[], Any]) -> list[Any]:
    """What a thread returns or raises; nothing if it still waits after a while."""
    found: list[Any] = []

    def body() -> None:
        try:
            found.append(run())
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(0.3)
    return found


def taken(lock: ComputeLock) -> bool:
    with lock:
        return True


def test_a_thread_may_enter_again_and_others_wait() -> None:
    lock = ComputeLock()
    with lock:
        assert not lock.is_nested
        with lock:
            assert lock.is_nested
        assert not lock.is_nested and in_thread(lambda: taken(lock)) == []
    assert in_thread(lambda: taken(lock)) == [True]


def test_another_asyncio_task_is_kept_out_of_a_block() -> None:
    lock = ComputeLock()

    async def other(inside: asyncio.Event) -> bool:
        await inside.wait()
        return taken(lock)

    async def main() -> bool:
        inside = asyncio.Event()
        waiting = asyncio.create_task(other(inside))
        with lock, lock.as_block():
            with lock, lock.as_block():  # its own blocks may be nested
                inside.set()
                with pytest.raises(RuntimeError, match="another asyncio task"):
                    await waiting
            return await asyncio.create_task(other(inside))  # started within the block, it belongs to it

    assert asyncio.run(main()) and taken(lock)


def test_a_thread_started_in_a_block_is_refused_instead_of_waiting_for_ever() -> None:
    lock = ComputeLock()
    with lock, lock.as_block():
        inherited = contextvars.copy_context()
        [error] = in_thread(lambda: inherited.run(taken, lock))
    assert "within a block" in str(error)
    assert in_thread(lambda: inherited.run(taken, lock)) == [True]


def test_a_backward_pass_in_a_thread_of_pytorchs_does_not_wait_for_the_one_that_waits_for_it() -> None:
    lock = ComputeLock()
    caller = threading.get_ident()

    def recompute(thread: int) -> bool:
        with lock.recomputing_for(thread):
            return True

    with lock, lock.as_block():
        assert in_thread(lambda: recompute(caller)) == [True]
        assert in_thread(lambda: recompute(caller + 1)) == []
        assert recompute(caller)
    with lock:  # it computes, and does not wait
        assert in_thread(lambda: recompute(caller)) == []
        assert recompute(caller)


def test_what_hooks_entered_is_left_with_the_statement_around_them() -> None:
    lock = ComputeLock()
    lock.enter(by_hook=True)
    with lock:
        lock.enter(by_hook=True)  # and never left, as after a KeyboardInterrupt
        lock.enter(by_hook=True)
    assert not lock.is_nested and in_thread(lambda: taken(lock)) == []
    with lock:
        lock.leave_hook()  # of a hook that failed before it entered
        assert lock.is_nested
    lock.leave_hook()
    assert in_thread(lambda: taken(lock)) == [True]
    lock.leave_hook()
    assert taken(lock)


def test_copies_and_pickles_are_locks_of_their_own() -> None:
    lock = ComputeLock()
    with lock:
        for other in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
            assert in_thread(lambda other=other: taken(other)) == [True]
