"""Run the study of language models that bench/language.md declares; what is done already is left out.

    python -m qtuning_fast.bench.language.run --jobs 2                       # everything that is left
    python -m qtuning_fast.bench.language.run --models flan-t5 --minutes 60

First the rates of peft's methods are chosen, then each run is a file `<out>/<model>/<arm>/<draw>.json`. Runs have one
thread each. One that was cut off starts again.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qtuning_fast.bench.language.arms import (
    ARMS,
    IN_CONTEXT,
    MAX_LENGTH,
    MODELS,
    OURS,
    RATES,
    ZERO_SHOT,
    LanguageModel,
    Learned,
    RateRun,
    Run,
    all_runs,
    tasks_of,
    tuning_task,
)
from qtuning_fast.bench.language.ours import OwnAdapters
from qtuning_fast.bench.language.peers import Peer
from qtuning_fast.bench.language.rates import choose, left_of, rate_of
from qtuning_fast.bench.language.scores import InContext, chosen_examples, scores_of, tokens_in_front
from qtuning_fast.bench.learning.pool import parser_of_study, run_each
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.data.encoding import ExampleEncoder
from qtuning_fast.lifelong.environment import versions
from qtuning_fast.lifelong.evaluation import task_score
from qtuning_fast.lifelong.scores import score
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.method.labels import SINGLE
from qtuning_fast.model.checked_files import write_json
from qtuning_fast.model.fingerprint import fingerprint
from qtuning_fast.model.model import QTuningModel

OUT = Path("bench/results/language")
WORK = Path("runs/language")
EVALUATED = 64  # texts a batch
BEHIND_EXAMPLES = 8  # pairs of a text and an answer in a pass behind examples, whose cache each of them has

Folders = Mapping[str, str]
"""Where each model is."""


def result_file(out: Path, run: Run | RateRun) -> Path:
    return out / f"{run.name}.json"


def one_run(run: Run, folders: Folders, out: Path, rehearsal: bool) -> None:
    """Do a run and write its file."""
    with_model = _Loaded(run.model, folders)
    tasks = tasks_of(run.draw, rehearsal=rehearsal)
    work = _cleared(WORK / ("rehearsal" if rehearsal else "runs") / run.name)
    began = time.perf_counter()
    about: dict[str, Any] = {}
    if run.arm == ZERO_SHOT:
        learned = [with_model.asked(task) for task in tasks]
    elif run.arm == IN_CONTEXT:
        learned = [with_model.asked_behind_examples(task, run.draw) for task in tasks]
    elif run.arm in OURS:
        learned = with_model.ours(run, tasks, work, rehearsal)
    else:
        about["rate"] = RATES[run.arm][0] if rehearsal else rate_of(out, run.model, run.arm)
        peer = with_model.peer(run.arm, about["rate"], run.draw, work, rehearsal)
        learned = [peer.learn(task, number) for number, task in enumerate(tasks)]
    about |= asdict(run) | {"per_task": [asdict(each) for each in learned]}
    about |= {"seconds": round(time.perf_counter() - began, 1), "fingerprint": fingerprint(with_model.base)}
    _write(result_file(out, run), about)
    shutil.rmtree(work)


def one_rate(run: RateRun, folders: Folders, out: Path, rehearsal: bool) -> None:
    """Learn a task with a rate, and write the loss of the right answers to its validation examples."""
    work = _cleared(WORK / ("rehearsal" if rehearsal else "runs") / run.name)
    peer = _Loaded(run.model, folders).peer(run.arm, run.rate, 0, work, rehearsal)
    loss = peer.validation_loss(tuning_task(run.task, rehearsal=rehearsal))
    _write(result_file(out, run), asdict(run) | {"loss": loss})
    shutil.rmtree(work)


class _Loaded:
    """A model of the study in this process."""

    def __init__(self, name: str, folders: Folders) -> None:
        torch.set_num_threads(1)
        self.model: LanguageModel = MODELS[name]
        self.base: PreTrainedModel
        self.base, self.tokenizer = load_base_model(folders[name], self.model.task_type)
        self.encoder = ExampleEncoder(self.tokenizer, self.model.task_type, MAX_LENGTH)

    def asked(self, task: Task) -> Learned:
        """Ask the base model alone."""
        model = QTuningModel(self.base, self.model.config())
        answers = self.encoder.encode_answers(task.answers, task=task.name)
        test = self.encoder.as_asked(self.encoder.encode(task.test), task.template)
        accuracy = task_score(model, test, EVALUATED, answers)
        model.detach()
        return Learned(task.name, accuracy)

    def asked_behind_examples(self, task: Task, draw: int) -> Learned:
        """Ask the base model with examples in front of each text."""
        answers = self.encoder.encode_answers(task.answers, task=task.name)
        assert answers is not None  # a language model has some
        shown = chosen_examples(task, draw)
        reader = InContext(self.base, tokens_in_front(shown, self.encoder, answers, task.template))
        test = self.encoder.as_asked(self.encoder.encode(task.test), task.template)
        found = scores_of(
            reader, test, answers, two_stacks=False, device=self.base.device, rows=max(BEHIND_EXAMPLES, len(answers))
        )
        texts = [f"{text}{task.answers[int(label)]}" for text, label in zip(shown.inputs, shown.labels)]  # type: ignore[arg-type]
        stored = sum(len(text.encode()) for text in texts)
        return Learned(task.name, score(SINGLE, found, task.test.labels), stored_bytes=stored)

    def ours(self, run: Run, tasks: Sequence[Task], work: Path, rehearsal: bool) -> list[Learned]:
        """Learn with this library."""
        arm = OURS[run.arm]
        options = self.model.options(run.draw, rehearsal=rehearsal)
        learner = OwnAdapters(self.base, self.tokenizer, self.model.config(**arm.config), tasks, options, work)
        return learner.learn(together=arm.together)

    def peer(self, method: str, rate: float, draw: int, work: Path, rehearsal: bool) -> Peer:
        """One of peft's methods."""
        options = self.model.options(draw, rehearsal=rehearsal)
        return Peer(self.base, self.encoder, method, self.model, rate, options, work)


def _cleared(work: Path) -> Path:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content | {"versions": versions() | {"peft": version("peft")}})


def main(arguments: list[str] | None = None) -> int:
    """Run what is left of the study; returns the exit status."""
    parser = parser_of_study(__doc__, OUT, "two steps of one task with few texts, draw 1 only")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default both")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default all")
    for name, model in MODELS.items():
        text = f"a folder of {model.title}; `make {model.folder}/config.json` makes {model.folder}"
        parser.add_argument(f"--{name}", default=str(model.folder), metavar="FOLDER", help=text)
    options = parser.parse_args(arguments)
    folders = {name: getattr(options, name.replace("-", "_")) for name in MODELS}
    for name in options.models:
        if not (Path(folders[name]) / "config.json").exists():
            parser.error(f"{folders[name]} holds no model; `make {MODELS[name].folder}/config.json` makes one")
    if options.dry_run and options.out == OUT:
        options.out = WORK / "rehearsed"  # the study's own runs are never those of a rehearsal
    do = {"folders": folders, "out": options.out, "rehearsal": options.dry_run}

    ends = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    rates = [run for run in left_of(options.out) if run.model in options.models and run.arm in options.arms]
    if options.dry_run:
        rates = [run for run in rates if run.rate == RATES[run.arm][0] and run.task == rates[0].task]
    print(f"{len(rates)} runs are left to choose rates", flush=True)
    failed = run_each(rates, partial(one_rate, **do), options.jobs, options.minutes)
    for name in options.models:
        choose(options.out, name)

    runs = [run for run in all_runs() if run.model in options.models and run.arm in options.arms]
    runs = [run for run in runs if not options.dry_run or run.draw == 1]
    left = [run for run in runs if not result_file(options.out, run).exists()]
    print(f"{len(runs) - len(left)} of {len(runs)} runs are done", flush=True)
    minutes = None if ends is None else max(0.0, (ends - time.monotonic()) / 60)
    failed += run_each(left, partial(one_run, **do), options.jobs, minutes)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
