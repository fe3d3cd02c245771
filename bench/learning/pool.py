"""What studies share: their options, and many runs in processes of one thread each."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

Thing = TypeVar("Thing")


def parser_of_study(about: str | None, out: Path, dry_run: str) -> argparse.ArgumentParser:
    """Return a parser of what every study takes.

    Args:
        about: what `--help` says of it.
        out: the folder of its results.
        dry_run: what a rehearsal runs.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER", help="the results")
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    return parser


def run_each(left: Sequence[Thing], do: Callable[[Thing], object], jobs: int, minutes: float | None) -> int:
    """Do each thing in one of several processes, in order; return how many failed.

    Args:
        left: what is to be done; each has a `name`.
        do: does one; a function that processes can be given.
        jobs: processes at once.
        minutes: begin nothing after so many.
    """
    ends = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    failed, waiting = 0, deque(left)
    with tqdm(total=len(left), disable=None) as bar:
        while waiting and time.monotonic() < ends:
            failed += _until_one_is_killed(waiting, do, jobs, ends, bar)
    return failed


def _until_one_is_killed(
    waiting: deque[Thing], do: Callable[[Thing], object], jobs: int, ends: float, bar: tqdm[Any]
) -> int:
    """Do what is waiting, until all is done or a process is killed, which ends them all; return how many failed."""
    failed, killed = 0, False
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running: dict[Future[object], Thing] = {}
        while True:
            while not killed and waiting and len(running) < jobs and time.monotonic() < ends:
                thing = waiting.popleft()
                running[pool.submit(do, thing)] = thing
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                thing = running.pop(future)
                if (error := future.exception()) is not None:
                    failed += 1
                    killed = killed or isinstance(error, BrokenProcessPool)
                    name = getattr(thing, "name", thing)
                    print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                bar.update()
