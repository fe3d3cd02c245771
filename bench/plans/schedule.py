"""Decides which units of a step still begin before its deadline, and logs how long each of them took.

A unit is the smallest piece of work whose result is kept: one peer's row, one heat of candidates. A step asks before
each unit, so that nothing begins that would end too late, and the log says what was under way when a process died.
Deadlines are on the clock that all processes share (`time.monotonic`).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from qtuning_fast.bench.results import Results

DONE, UNDER_WAY, DIED, NO_TIME = "done", "under way", "its process died or hung", "left out: no time"
SLOWEST = 3.0  # how far the units so far may stretch what is expected of the next ones
RESTART = 75  # the exit status of a process that asks for a fresh one, as after an error that broke its CUDA context


class Unit(NamedTuple):
    """The smallest piece of work whose result is kept."""

    name: str
    seconds: float  # that it is expected to take
    kind: str = ""
    of: Any = None  # its subject
    reserve: float = 0.0  # seconds of what must still fit after it


Log = dict[str, dict[str, Any]]  # by unit: "status", "expected" and "took" in seconds


class Schedule:
    """The units of one step.

    Args:
        deadline: no unit begins that would end after it.
        clock: seconds; that of the deadline.
        log: that of an earlier process. What it has done is not done again; a unit that killed a process is not tried
            again.
        write: called whenever the log has changed.
    """

    def __init__(
        self,
        deadline: float = math.inf,
        *,
        clock: Callable[[], float] = time.monotonic,
        log: Log | None = None,
        write: Callable[[], None] = lambda: None,
    ) -> None:
        self.deadline, self.log = deadline, {} if log is None else log
        self._clock, self._write = clock, write
        self._started = 0.0
        self._now = ""  # the unit under way
        for entry in self.log.values():
            if entry["status"] == UNDER_WAY:
                entry["status"] = DIED

    @classmethod
    def of(cls, results: Results, deadline: float) -> "Schedule":
        """The schedule of the units that fill a file of results; their log is part of it."""
        return cls(deadline, log=results.document["units"], write=results.write)

    def may_begin(self, unit: str, seconds: float, reserve: float = 0.0) -> bool:
        """Whether a unit begins now; ends the unit before it.

        Args:
            unit: its name.
            seconds: that it is expected to take.
            reserve: seconds of what must still fit after it.
        """
        self.end()
        if self.status(unit) in (DONE, DIED):
            return False
        fits = self._clock() + (seconds + reserve) * self._pace() <= self.deadline
        self.log[unit] = {"status": UNDER_WAY if fits else NO_TIME, "expected": round(seconds, 2), "took": None}
        if fits:
            self._now, self._started = unit, self._clock()
        self._write()
        return fits

    def each(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """The units that there is time for, one after the other."""
        for unit in units:
            if self.may_begin(unit.name, unit.seconds, unit.reserve):
                yield unit
        self.end()

    def end(self) -> None:
        """Ends the unit under way."""
        if self._now:
            self.log[self._now] |= {"status": DONE, "took": round(self._clock() - self._started, 2)}
            self._now = ""
            self._write()

    def status(self, unit: str) -> str:
        """The status of a unit; empty: it was never asked for."""
        return self.log[unit]["status"] if unit in self.log else ""

    def _pace(self) -> float:
        """The time of the units so far over the time that was expected of them; at least 1."""
        ended = [entry for entry in self.log.values() if entry["took"] is not None]
        if len(ended) < 3:
            return 1.0
        ratio = sum(entry["took"] for entry in ended) / max(sum(entry["expected"] for entry in ended), 1e-9)
        return min(max(ratio, 1.0), SLOWEST)
