"""Which units of a step still begin before its deadline, and a log of what each of them took.

A unit is the least that a step brings home: one peer's row, one heat of candidates. A step asks before each of them, so
that nothing begins that the time left does not hold, and whoever reads the log knows what was under way when a process
died. Deadlines are on the clock that all processes share (`time.monotonic`).
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

DONE, UNDER_WAY, DIED, NO_TIME = "done", "under way", "its process died or hung", "left out: no time"
SLOWEST = 3.0  # how far the units so far may stretch what is expected of the next ones
RESTART = 75  # the exit status of a process that asks for a fresh one, as after an error that broke its CUDA context


class Unit(NamedTuple):
    """The least that a step brings home."""

    name: str
    seconds: float  # that are expected of it
    kind: str = ""
    of: Any = None  # what it is about
    reserve: float = 0.0  # seconds of what must still fit after it


Log = dict[str, dict[str, Any]]  # by unit: "status", "expected" and "took" in seconds


class Schedule:
    """The units of one step.

    Args:
        deadline: no unit begins that would end after it.
        clock: seconds; that of the deadline.
        log: that of a process before this one: what it has done is not done again. A unit that killed a process is not
            tried again.
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

    def may_begin(self, unit: str, seconds: float, reserve: float = 0.0) -> bool:
        """Whether a unit of so many seconds is to be done now; ends the one before it.

        Args:
            unit: its name.
            seconds: that are expected of it.
            reserve: those of what must still fit after it.
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

    def end(self) -> None:
        """The unit under way is done."""
        if self._now:
            self.log[self._now] |= {"status": DONE, "took": round(self._clock() - self._started, 2)}
            self._now = ""
            self._write()

    def status(self, unit: str) -> str:
        """What became of a unit; empty: nobody has asked for it."""
        return self.log[unit]["status"] if unit in self.log else ""

    def _pace(self) -> float:
        """How many times as long as expected the units so far took; at least 1."""
        ended = [entry for entry in self.log.values() if entry["took"] is not None]
        if len(ended) < 3:
            return 1.0
        ratio = sum(entry["took"] for entry in ended) / max(sum(entry["expected"] for entry in ended), 1e-9)
        return min(max(ratio, 1.0), SLOWEST)
