"""What the study runs: its streams and its arms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from qtuning_fast.lifelong.methods import method_by_name
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.stream import Stream, TaskSource
from qtuning_fast.lifelong.tasks import Labelled
from qtuning_fast.lifelong.text_streams import SENTIMENTS, TEXT_STREAMS
from qtuning_fast.method.config import QTuningConfig

# Heads end as training leaves them, which was the default when the study began; it is not any more.
TRAINING = {"steps": 60, "eval_every": 10, "head_end": "trained"}

LINEAR = "linear"
"""The arm without prompts: linear classifiers of the frozen model's features."""

START, START_MIXED = "start", "start, head mixed"
"""The defaults with heads as training leaves them, and the defaults."""


def _named(*names: str) -> tuple[TaskSource, ...]:
    """Tasks of the packaged streams."""
    sources = {source.name: source for stream in TEXT_STREAMS.values() for source in stream.sources}
    return tuple(sources[name] for name in names)


def _half(read: Callable[[], Labelled], half: int) -> Labelled:
    """Every second text of a source; the halves share none."""
    inputs, labels = read()
    return list(inputs)[half::2], list(labels)[half::2]


def _halves(source: TaskSource) -> tuple[TaskSource, ...]:
    """Two tasks with the same classes and different texts."""
    assert source.read_test is not None
    return tuple(
        replace(
            source,
            name=f"{source.name}-{'ab'[half]}",
            read=partial(_half, source.read, half),
            read_test=partial(_half, source.read_test, half),
        )
        for half in range(2)
    )


_POLAR_AIRLINES = replace(_named("airlines")[0], classes=SENTIMENTS)  # without neutral

STUDY_STREAMS = {
    "related": Stream("positive or negative", (*_named("movies", "amazon", "tweets", "nyt"), _POLAR_AIRLINES), 3),
    "halves": Stream("halves of one task", _halves(*_named("20ng-rec")), 2),
    "unrelated": Stream("questions, spam, readers", _named("trec", "sms", "books"), 2),
    "offline-15": TEXT_STREAMS["offline-15"],
}


@dataclass(frozen=True)
class Arm:
    """Settings on top of a method's.

    Attributes:
        method: a method by name.
        config, training: what differs.
        random_queue: whether the queue's rows are replaced by random ones of the same mean and spread, a control.
    """

    method: str = "q-tuning"
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    random_queue: bool = False

    def settings(self, stream: Stream, draw: int) -> tuple[QTuningConfig, TrainingOptions]:
        """The config and the training options of a run."""
        method = method_by_name(self.method)
        config = {"queue_size": stream.queue_size, **method.config, **self.config}
        return method.settings(config, {**TRAINING, "seed": draw, **self.training})


FROM_RANDOM = {"start_from": "random", "head_start": "random"}
CLOSED_FORM = {"start_from": "random", "head_start": "closed-form"}

CORE = {
    START: Arm(),
    "from-random": Arm(training=FROM_RANDOM),
    "closed-form-head": Arm(training=CLOSED_FORM),
    "prompt-per-task": Arm("prompt-per-task"),
    "prompt-per-task, closed-form head": Arm("prompt-per-task", training=CLOSED_FORM),
}

PEERS = {
    "progressive-prompts": Arm("progressive-prompts"),
    "one-prompt": Arm("one-prompt"),
    "random rows in the queue": Arm(random_queue=True),
}

# Random starts may need a faster reparametrisation than the defaults have, whose rate was chosen for the other starts.
_FASTER = {"network_rate": 1e-3}
FASTER = {
    "from-random, faster network": Arm(training=FROM_RANDOM | _FASTER),
    "prompt-per-task, faster network": Arm("prompt-per-task", training=_FASTER),
}

# The head of training joined by the closed form of training and validation examples.
MIXED = {START_MIXED: Arm(training={"head_end": "mixed"})}

# `start`, each without one ingredient, and the pairs that may stand in for each other.
WITHOUT = {
    "no queue": Arm(config={"queue_size": 1}),
    "no reweighting": Arm(config={"reweighting": None}),
    "no gate": Arm(config={"gate": None}),
    "no shared prompt": Arm(config={"shared_length": 0, "retention_weight": 0.0}),
    "no retention": Arm(config={"retention_weight": 0.0}),
    "fifo": Arm(config={"eviction": "fifo"}),
    "random eviction": Arm(config={"eviction": "random"}),
    "no queue, no shared prompt": Arm(config={"queue_size": 1, "shared_length": 0, "retention_weight": 0.0}),
    "no reweighting, no gate": Arm(config={"reweighting": None, "gate": None}),
}

PLACES = {
    "input": Arm(config={"placement": "input"}),
    "layers 0 to 4": Arm(config={"layers": (0, 1, 2, 3, 4)}),
    "50 rows": Arm(config={"prompt_length": 50}),
}


FIRST = 5  # draws of every part, before any part has more


@dataclass(frozen=True)
class Run:
    """One arm on one draw of one stream."""

    stream: str
    shots: int
    arm: str
    draw: int

    @property
    def name(self) -> str:
        """A name that is a path, too."""
        return f"{self.stream}/{self.shots}/{self.arm.replace(' ', '-').replace(',', '')}/{self.draw}"


def _part(stream: str, shots: int, arms: Mapping[str, Arm], draws: int) -> list[Run]:
    return [Run(stream, shots, arm, draw) for draw in range(draws) for arm in (LINEAR, *arms)]


def _some(arms: Mapping[str, Arm], *names: str) -> dict[str, Arm]:
    return {name: arms[name] for name in names}


ARMS = CORE | FASTER | MIXED | PEERS | WITHOUT | PLACES

PARTS = {
    "related-16": partial(_part, "related", 16, CORE, 10),
    "related-4": partial(_part, "related", 4, CORE, 10),
    "faster-16": partial(_part, "related", 16, FASTER, FIRST),
    "faster-4": partial(_part, "related", 4, FASTER, FIRST),
    "mixed-16": partial(_part, "related", 16, MIXED, 10),
    "mixed-4": partial(_part, "related", 4, MIXED, 10),
    "mixed-15": partial(_part, "offline-15", 16, MIXED, FIRST),
    "mixed-unrelated": partial(_part, "unrelated", 16, MIXED, FIRST),
    "related-50": partial(_part, "related", 50, _some(CORE, "start", "from-random", "prompt-per-task"), 10),
    "unrelated": partial(_part, "unrelated", 16, _some(CORE, "start", "from-random", "closed-form-head"), 10),
    "halves": partial(_part, "halves", 8, _some(CORE, "start", "from-random", "closed-form-head"), 10),
    "without": partial(_part, "related", 16, WITHOUT, 10),
    "peers": partial(_part, "related", 16, PEERS, 10),
    "places": partial(_part, "related", 16, PLACES, 5),
    "offline-15": partial(_part, "offline-15", 16, _some(CORE, "start", "from-random"), 5),
}


def runs_of(parts: Sequence[str]) -> list[Run]:
    """The runs of some parts, each once: part after part with `FIRST` draws, then part after part with the others."""
    runs = {run.name: run for part in parts for run in PARTS[part]()}
    return sorted(runs.values(), key=lambda run: run.draw >= FIRST)


def smaller(stream: Stream, tasks: int) -> Stream:
    """The first tasks of a stream, for a rehearsal."""
    return replace(stream, sources=stream.sources[:tasks])
