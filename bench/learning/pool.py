"""Run many independent things in processes of one thread each, and say which failed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import TypeVar

from tqdm import tqdm

Thing = TypeVar("Thing")


def run_each(left: Sequence[Thing], do: Callable[[Thing], object], jobs: int, minutes: float | None) -> int:
    """Do each thing in one of several processes, in order; return how many failed.

    Args:
        left: what is to be done; each has a `name`.
        do: does one; a function that processes can be given.
        jobs: processes at once.
        minutes: begin nothing after so many.
    """
    ends = time.monotonic() + 60 * minutes if minutes else float("inf")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    failed = 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool, tqdm(total=len(left), disable=None) as bar:
        running: dict[Future[object], Thing] = {}
        waiting = iter(left)
        while True:
            while len(running) < jobs and time.monotonic() < ends and (thing := next(waiting, None)) is not None:
                running[pool.submit(do, thing)] = thing
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                thing = running.pop(future)
                if (error := future.exception()) is not None:
                    failed += 1
                    name = getattr(thing, "name", thing)
                    print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                bar.update()
