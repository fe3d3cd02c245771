"""Runs the steps of a plan one after the other, the most important first, and gathers their results in one file.

    python -m qtuning_fast.bench.plans.run cpu           all questions, on a CPU
    python -m qtuning_fast.bench.plans.run gpu --out FILE   tests, the operator beside its peers, tuning; 9 minutes
    python -m qtuning_fast.bench.plans.run gpu-second --out FILE   what that left out, long contexts, growth; 3 minutes
    python -m qtuning_fast.bench.plans.run gpu-drop-in --out FILE   windows, packed sequences, caps; 4 minutes
    python -m qtuning_fast.bench.plans.run gpu-models --out FILE   200 tasks in a row, whole models; 9 minutes
    python -m qtuning_fast.bench.plans.run gpu --dry-run   the same steps on tiny shapes, without a GPU if need be
    python -m qtuning_fast.bench.plans.run --unpack FILE   put the results of a run where they belong

The steps are in `plan.py`. FILE is rewritten while they run, so that a run that is cut off keeps what it has found. It
holds the status of each step and everything that the steps wrote, the tables of blocks and backends among them. The
last output is a short table.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from qtuning_fast.bench.plans import triton_cache
from qtuning_fast.bench.plans.archive import Archive, Outcome, device, summary, unpack
from qtuning_fast.bench.plans.plan import PLANS, TOTAL_SECONDS, Step, all_steps
from qtuning_fast.bench.plans.schedule import NO_TIME, UNDER_WAY
from qtuning_fast.bench.results import ROOT, RUNS

POLL_SECONDS = 1.0
GRACE = 10.0  # seconds beyond its deadline after which a step is stopped
FIRST_GRACE = 60.0  # of one on which the others depend: nothing is on this machine's disk cache yet
PATIENCE, TIMES_EXPECTED = 60.0, 5.0  # a unit that takes longer than both hangs
MOST_PROCESSES = 4  # of one step
LEAST_SECONDS = 10.0  # for which a process is worth starting


class Process(Protocol):
    """A step at work."""

    def ended(self) -> int | None:
        """Its exit status; None while it runs."""

    def stop(self) -> None:
        """Ends it, with all that it has started."""


class Executor(Protocol):
    """Runs steps and lets time pass: processes, or a rehearsal of them."""

    def start(self, step: Step, deadline: float) -> Process: ...

    def wait(self, seconds: float) -> None: ...


class Run:
    """One run of a plan.

    Args:
        steps: of the plan, in order.
        executor: what runs them.
        clock: seconds; the one that deadlines are on.
        gather: called whenever a step may have written.
        units: the log of a step's units so far.
        verdict: what a step has found to be wrong; empty: nothing, None: it has no verdict.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        executor: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
        gather: Callable[[], None] = lambda: None,
        units: Callable[[str], dict[str, Any]] = lambda step: {},
        verdict: Callable[[str], str | None] = lambda step: None,
    ) -> None:
        self.steps, self.executor, self.clock = steps, executor, clock
        self.gather, self.units, self.verdict = gather, units, verdict
        self.outcomes = {step.name: Outcome(step.name) for step in all_steps(tuple(steps))}
        self.end = math.inf
        self._at_work: dict[str, Process] = {}
        self._started: dict[str, float] = {}
        self._seen: dict[str, tuple[str, float]] = {}  # by step: the unit under way, and since when
        self._died: dict[str, str] = {}  # by step: the one in which its last process ended

    def all(self, total_seconds: float) -> bool:
        """Runs the steps in order as far as time allows. Returns whether all that began went well."""
        self.end = self.clock() + total_seconds
        try:
            for number, step in enumerate(self.steps):
                left = self.end - self.clock()
                if left < min(15.0, step.seconds):
                    self.outcomes[step.name].status = NO_TIME
                    continue
                others = sum(later.seconds for later in self.steps[number + 1 :])
                self.together(step, self.clock() + min(max(step.seconds, left - others), left))
                if step.otherwise is not None and self._is_wrong(step):
                    self.together(step.otherwise, self.end)
                    if self.outcomes[step.otherwise.name].status != "done":  # else it has found nothing wrong
                        break
        finally:
            for process in self._at_work.values():
                process.stop()
            self.gather()
        begun = [outcome for outcome in self.outcomes.values() if outcome.processes]
        return bool(begun) and all(outcome.status == "done" for outcome in begun) and NO_TIME not in self._statuses()

    def _is_wrong(self, step: Step) -> bool:
        """Whether a step has found something wrong, or died before its verdict; not if it only took too long."""
        self.gather()
        verdict = self.verdict(step.name)
        return bool(verdict) or (verdict is None and self.outcomes[step.name].status.startswith("exit status"))

    def together(self, step: Step, deadline: float) -> None:
        """Runs a step and those beside it until all have ended or the time is up."""
        for each in (step, *step.concurrent):
            print(f"\n=== {each.name} ===", flush=True)
            self._start(each, deadline)
        while self._at_work:
            self.executor.wait(POLL_SECONDS)
            self.gather()
            for each in (step, *step.concurrent):
                if each.name in self._at_work:
                    self._look(each, deadline)

    def _start(self, step: Step, deadline: float) -> None:
        outcome = self.outcomes[step.name]
        self._started.setdefault(step.name, self.clock())
        self._died[step.name] = self._seen.pop(step.name, ("",))[0]
        self._at_work[step.name] = self.executor.start(step, deadline)
        outcome.status, outcome.processes = "cut off with the run", outcome.processes + 1

    def _look(self, step: Step, deadline: float) -> None:
        outcome, process = self.outcomes[step.name], self._at_work[step.name]
        outcome.seconds = round(self.clock() - self._started[step.name], 1)
        grace = FIRST_GRACE if step.otherwise is not None else GRACE
        hung, ended = self._hangs(step), process.ended()
        if ended is None and self.clock() >= min(deadline + grace, self.end):
            status = f"stopped at its limit of {self.clock() - self._started[step.name]:.0f} s"
        elif ended is None and not hung:
            return
        elif ended in (0, 1):
            status = "done" if ended == 0 else "exit status 1"
        else:
            status = f"it hung in {hung}" if hung else f"exit status {ended}"
            if step.within and outcome.processes < MOST_PROCESSES and deadline - self.clock() > LEAST_SECONDS:
                process.stop()
                self._start(step, deadline)
                return
        process.stop()
        del self._at_work[step.name]
        outcome.status = status

    def _hangs(self, step: Step) -> str:
        """The unit that a step is stuck in; empty: none."""
        now = [(unit, entry) for unit, entry in self.units(step.name).items() if entry["status"] == UNDER_WAY]
        if not now:
            return ""
        unit, entry = now[-1]
        if unit == self._died.get(step.name):  # the next process has not said so yet
            return ""
        if self._seen.get(step.name, ("",))[0] != unit:
            self._seen[step.name] = (unit, self.clock())
        patience = max(PATIENCE, TIMES_EXPECTED * entry["expected"])
        return unit if self.clock() - self._seen[step.name][1] > patience else ""

    def _statuses(self) -> list[str]:
        return [outcome.status for outcome in self.outcomes.values()]


class Processes:
    """Steps as processes of their own."""

    def __init__(self, folder: Path, *, dry_run: bool) -> None:
        self.folder, self.dry_run, self._watcher = folder, dry_run, _Watcher()

    def start(self, step: Step, deadline: float) -> Process:
        command = step.command(self.folder, deadline, dry_run=self.dry_run)
        return _Started(command, self._environment(), self._watcher)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def _environment(self) -> dict[str, str]:
        """A dry run without a GPU runs kernels in Triton's interpreter."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment.pop("TRITON_INTERPRET", None)
        if self.dry_run and device() == "cpu":
            environment["OMP_NUM_THREADS"] = "1"  # nothing is measured, and threads that wait disturb others
            environment["TRITON_INTERPRET"] = "1"
        return environment


class _Started:
    def __init__(self, command: list[str], environment: dict[str, str], watcher: "_Watcher") -> None:
        # In a session of its own, so that it can be stopped with all that it has started.
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        self.watcher = watcher
        watcher.tell("+", self.process.pid)

    def ended(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(3)
                break
        self.watcher.tell("-", self.process.pid)


class _Watcher:
    """A process that outlives a run that is killed, and then ends its steps with all their processes.

    A signal on the parent's death would reach a step, but not the processes that the step has started.
    """

    CODE = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""

    def __init__(self) -> None:
        command = [sys.executable, "-S", "-c", self.CODE]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, bufsize=1, start_new_session=True)

    def tell(self, sign: str, group: int) -> None:
        """Reports that a group of processes has begun (+) or ended (-)."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{sign}{group}\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="?", choices=PLANS)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; nothing is measured, no table rewritten")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps of the plan only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: runs/bench/PLAN.json")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="put what a run found where it belongs")
    options = parser.parse_args(arguments)
    if options.unpack:
        print(*unpack(options.unpack), sep="\n")
        return 0
    if options.plan is None:
        parser.error(f"name a plan: {', '.join(PLANS)}")
    if options.plan != "cpu" and device() == "cpu" and not options.dry_run:
        parser.error(f"plan {options.plan} takes a GPU; --dry-run rehearses it without")
    unknown = set(options.only or ()) - {step.name for step in PLANS[options.plan]}
    if unknown:
        parser.error(f"plan {options.plan} has no step {', '.join(unknown)}")
    steps = [step for step in PLANS[options.plan] if not options.only or step.name in options.only]

    folder, out = (RUNS / options.plan).resolve(), options.out or RUNS / f"{options.plan}.json"
    run = Run(steps, Processes(folder, dry_run=options.dry_run))
    gathered = Archive(options.plan, folder, out, list(run.outcomes.values()), dry_run=options.dry_run)
    run.gather, run.units, run.verdict = gathered.write, gathered.units, gathered.verdict
    triton_cache.unpack()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the steps at work are stopped, too
    try:
        fine = run.all(TOTAL_SECONDS.get(options.plan, math.inf))
    except KeyboardInterrupt:
        print(f"\nInterrupted. What was found by then: {out}")
        return 130
    print(summary(json.loads(out.read_text())))
    print(f"\nall of it: {out}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
