"""Runs of a study without processes."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from qtuning_fast.bench.learning import pool


class InThisProcess:
    """In place of a pool of processes."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, function: Any, *arguments: Any) -> Future[str]:
        future: Future[str] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "ProcessPoolExecutor", InThisProcess)
