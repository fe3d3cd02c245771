"""What the study of language models runs: its models, its tasks, its arms and its draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.stream import TaskSource
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.lifelong.text_streams import TEXT_STREAMS
from qtuning_fast.method.config import QTuningConfig

STREAM = TEXT_STREAMS["offline-3"]
TUNING_TASKS = ("movies", "sms")
"""Tasks that the study does not report, on whose validation examples the rates of peft's methods are chosen."""

SIZES = {"shots": 16, "validation_shots": 16, "test_size": 100}
REHEARSAL = {"shots": 16, "validation_shots": 2, "test_size": 8}
MAX_LENGTH, BATCH, LOOK_EVERY = 80, 8, 20

DRAWS, TUNING_DRAW = 5, 0
"""The draws that are reported are 1 to `DRAWS`; rates were found on draw 0."""


@dataclass(frozen=True)
class LanguageModel:
    """A frozen language model of the study.

    Attributes:
        title: what it is.
        task_type: see `QTuningConfig`.
        steps: of a task.
        folder: where `make` puts it.
        projections: the names of the attention's query and value projections.
        draws: of the arms that train; the others have `DRAWS`.
    """

    title: str
    task_type: str
    steps: int
    folder: Path
    projections: tuple[str, str]
    draws: int

    def options(self, draw: int, *, rehearsal: bool) -> TrainingOptions:
        """The budget of a task, and the defaults."""
        steps = {"steps": 2, "eval_every": 2} if rehearsal else {"steps": self.steps, "eval_every": LOOK_EVERY}
        return TrainingOptions(**steps, batch_size=BATCH, max_length=MAX_LENGTH, seed=draw)

    def config(self, **differs: Any) -> QTuningConfig:
        """The defaults, but for what differs."""
        return QTuningConfig(**{"task_type": self.task_type, "queue_size": STREAM.queue_size, **differs})


MODELS = {
    "smollm2": LanguageModel(
        "SmolLM2-135M-Instruct", "causal-lm", 40, Path("runs/smollm2"), ("q_proj", "v_proj"), draws=2
    ),
    "flan-t5": LanguageModel("flan-t5-small", "text-to-text", 60, Path("runs/flan-t5"), ("q", "v"), draws=DRAWS),
}

ZERO_SHOT, IN_CONTEXT = "zero-shot", "in-context"
DEFAULT = "default"


@dataclass(frozen=True)
class Ours:
    """An arm of this library.

    Attributes:
        config: what differs from the defaults.
        together: whether the tasks are learned in order by one model, which has a queue; else each alone.
    """

    config: Mapping[str, Any]
    together: bool = True


OURS = {
    DEFAULT: Ours({}),
    "no gate": Ours({"gate": None}),
    "no queue": Ours({}, together=False),
}

RATES = {
    "lora": (3e-4, 1e-3, 3e-3),
    "prompt-tuning": (3e-2, 1e-1, 3e-1),
    "prefix-tuning": (1e-2, 3e-2, 1e-1),
}
"""peft's methods, and the learning rates of which one is chosen for each model."""

ARMS = (ZERO_SHOT, IN_CONTEXT, *RATES, *OURS)


@dataclass(frozen=True)
class Run:
    """One arm on one draw of all tasks."""

    model: str
    arm: str
    draw: int

    @property
    def name(self) -> str:
        """A name that is a path, too."""
        return f"{self.model}/{self.arm.replace(' ', '-')}/{self.draw}"


@dataclass(frozen=True)
class RateRun:
    """One of peft's methods with one rate, on one of the tasks that choose the rate."""

    model: str
    arm: str
    rate: float
    task: str

    @property
    def name(self) -> str:
        """A name that is a path, too."""
        return f"{self.model}/rates/{self.arm}/{self.rate:g}/{self.task}"


@dataclass(frozen=True)
class Learned:
    """What a run says of a task.

    Attributes:
        name: of the task.
        accuracy: of the test texts.
        trained_parameters: how many numbers were trained for it.
        stored_bytes: of the file that keeps what was learned; of examples in context, of their texts and answers.
        step_seconds: the median of its training steps.
        best_step: the step of the look that was kept.
    """

    name: str
    accuracy: float
    trained_parameters: int = 0
    stored_bytes: int = 0
    step_seconds: float | None = None
    best_step: int | None = None


def arms_of(model: str) -> tuple[str, ...]:
    """The arms of a model; an encoder-decoder of 512 tokens reads no examples in context."""
    return tuple(arm for arm in ARMS if arm != IN_CONTEXT or MODELS[model].task_type == "causal-lm")


def all_runs() -> list[Run]:
    """Every run, draw by draw."""
    return [
        Run(model, arm, draw)
        for draw in range(1, DRAWS + 1)
        for model in MODELS
        for arm in arms_of(model)
        if draw <= (DRAWS if arm in (ZERO_SHOT, IN_CONTEXT) else MODELS[model].draws)
    ]


def rate_runs() -> list[RateRun]:
    """Every run that is needed to choose rates."""
    return [
        RateRun(model, arm, rate, task)
        for model in MODELS
        for arm, rates in RATES.items()
        for rate in rates
        for task in TUNING_TASKS
    ]


def tasks_of(draw: int, *, rehearsal: bool) -> list[Task]:
    """The tasks that are reported; of a rehearsal the first, with few texts."""
    tasks = STREAM.load(seed=draw, **(REHEARSAL if rehearsal else SIZES))
    return tasks[:1] if rehearsal else tasks


def tuning_task(name: str, *, rehearsal: bool) -> Task:
    """One of the tasks that choose rates."""
    sources: dict[str, TaskSource] = {each.name: each for stream in TEXT_STREAMS.values() for each in stream.sources}
    return sources[name].load(seed=TUNING_DRAW, **(REHEARSAL if rehearsal else SIZES))
