"""Things are done in order; one that fails stops no other, and none begins when the time is over."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from qtuning_fast.bench.learning import pool


@pytest.mark.usefixtures("in_this_process")
def test_one_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    things = [SimpleNamespace(name=f"thing-{number}") for number in range(4)]
    did = []

    def do(thing: Any) -> None:
        did.append(thing)
        if thing is things[1]:
            raise RuntimeError("broken")

    assert pool.run_each(things, do, 2, None) == 1
    assert did == things and capsys.readouterr().err.startswith("thing-1: RuntimeError: broken")


@pytest.mark.usefixtures("in_this_process")
def test_nothing_begins_after_the_end() -> None:
    assert pool.run_each([1, 2], lambda thing: pytest.fail("it began"), 1, 1e-9) == 0


def test_in_processes_of_one_thread() -> None:
    assert pool.run_each([2, 3], int, 2, None) == 0


def test_a_process_that_is_killed_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert pool.run_each([7, 0, 0], os._exit, 1, None) == 3  # each ends its process
    assert capsys.readouterr().err.count("BrokenProcessPool") == 3
