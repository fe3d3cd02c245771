"""Batches that fill while another is computed.

Serve's own `serve.batch` closes a batch a set time after its first request, whether or not another is computed: under
load, batches stay small and wait in a row. Here a batch begins when the one before ends, with all that waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batching(Generic[Item, Result]):
    """Computes the items of several requests together, in the order in which they came.

    Args:
        compute: returns a result for each item of a batch; it is called for one batch at a time.
        most: items in a batch at most; a request with more makes a batch of its own.
    """

    def __init__(self, compute: Callable[[list[Item]], Awaitable[Sequence[Result]]], most: int) -> None:
        self._compute, self._most = compute, most
        self._waiting: deque[tuple[list[Item], asyncio.Future[list[Result]]]] = deque()
        self._working: asyncio.Task[None] | None = None

    async def answer(self, items: list[Item]) -> list[Result]:
        """Return the results of a request's items. If it is cancelled before its batch begins, nothing is computed."""
        future: asyncio.Future[list[Result]] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, future))
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        await asyncio.sleep(0)  # what arrives together is computed together
        while together := self._next():
            try:
                results = iter(await self._compute([item for items, _ in together for item in items]))
                for items, future in together:
                    found = [next(results) for _ in items]
                    if not future.done():
                        future.set_result(found)
            except Exception as error:
                for _, future in together:
                    if not future.done():
                        future.set_exception(error)
        self._working = None

    def _next(self) -> list[tuple[list[Item], asyncio.Future[list[Result]]]]:
        """Take the requests of the next batch, without those that were cancelled."""
        together: list[tuple[list[Item], asyncio.Future[list[Result]]]] = []
        size = 0
        while self._waiting and (not together or size + len(self._waiting[0][0]) <= self._most):
            items, future = self._waiting.popleft()
            if not future.done():
                together.append((items, future))
                size += len(items)
        return together
