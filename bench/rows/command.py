"""What the commands of bench/ share: options that are spelled once, and entry after entry into a file of results."""

import argparse
import gc
import math
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qtuning_fast.bench.measure import QUICK, REHEARSED, TURNS, default_device, in_a_process
from qtuning_fast.bench.plans.schedule import Schedule
from qtuning_fast.bench.results import RUNS, Results
from qtuning_fast.bench.timing import Turns, first_line, give_back


class Command(argparse.ArgumentParser):
    """The command line of one module, with --out and --dry-run.

    Args:
        module: its full name.
        about: its docstring.
        name: of its file of results; default the module's.
        dry_run: what a dry run does.
        quick: whether it takes --quick.
        deadline: whether it takes --deadline, as a step of a plan that leaves out what would end later.
    """

    def __init__(
        self,
        module: str,
        about: str | None,
        name: str = "",
        *,
        dry_run: str = "tiny shapes, to see that it runs",
        quick: bool = False,
        deadline: bool = False,
    ) -> None:
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.module, self.name = module, name or module.rpartition(".")[2]
        self.add_argument("--out", type=Path, default=RUNS / f"{self.name}.json", metavar="FILE", help="the results")
        self.add_argument("--dry-run", action="store_true", help=dry_run)
        if quick:
            self.add_argument("--quick", action="store_true", help="fewer rounds")
        if deadline:
            about = "leave out what would end later, in seconds of time.monotonic()"
            self.add_argument("--deadline", type=float, default=math.inf, metavar="SECONDS", help=about)

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        """The options of these arguments; None: of the process's own."""
        self.given = sys.argv[1:] if arguments is None else arguments
        return self.parse_args(self.given)

    def results(self, options: argparse.Namespace, device: str = "", **settings: Any) -> Results:
        """The file of results, begun; under a deadline with what an earlier process left in it. Prints its heading."""
        command = shlex.join(["python", "-m", self.module, *self.given])
        going_on = in_a_plan(options)
        results = Results(self.name, options.out, device or default_device(), command, going_on=going_on, **settings)
        print(results.heading(), flush=True)
        return results


def in_a_plan(options: argparse.Namespace) -> bool:
    """Whether the command runs under a deadline: in one process, which leaves out what there is no time for."""
    return getattr(options, "deadline", math.inf) < math.inf


def turns_of(options: argparse.Namespace, usual: Turns = TURNS) -> Turns:
    """How candidates take turns, by --dry-run and --quick."""
    return REHEARSED if options.dry_run else QUICK if getattr(options, "quick", False) else usual


def measure_each(
    results: Results,
    jobs: Mapping[str, Callable[..., dict[str, Any]]],
    table: Callable[[dict[str, Any]], str],
    deadline: float = math.inf,
) -> int:
    """Measures entry after entry, into the file and onto the screen.

    Without a deadline each job has a process of its own. With one they share this process, which an error may end;
    each job then gets a `schedule`, its entry so far (`known`), and a function that keeps an entry (`wrote`).

    Args:
        jobs: what makes an entry, by its name; other processes must be able to load it.
        table: an entry as text.
        deadline: on the clock of time.monotonic().

    Returns the exit status: 1 if an entry could not be measured.
    """
    apart, schedule = deadline == math.inf, Schedule.of(results, deadline)
    for name, job in tqdm(jobs.items(), disable=None):
        try:
            entry = in_a_process(job) if apart else scheduled(job, name, results, schedule)()
        except Exception as error:  # a job whose process died, too; the others go on
            results.fail(name, first_line(error))
            continue
        results.add(name, entry)
        tqdm.write(f"\n{table(entry)}")
        sys.stdout.flush()
        if not apart:
            _forget()
    return results.finish()


def scheduled(job: Callable[..., dict[str, Any]], name: str, results: Results, schedule: Schedule) -> partial[Any]:
    known = results.document["entries"].get(name)
    return partial(job, schedule=schedule, known=known, wrote=partial(results.add, name))


def _forget() -> None:
    """Drops what an entry leaves in this process: compiled graphs, whose number is limited, and memory."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        give_back()
