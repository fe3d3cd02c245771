"""The settings of a run: where its tasks come from, and how each of them is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from qtuning_fast.lifelong.data.augmentation import AUGMENTATIONS
from qtuning_fast.lifelong.data.loading import load_task, parse_spec
from qtuning_fast.lifelong.data.wording import worded
from qtuning_fast.lifelong.stream import Stream
from qtuning_fast.lifelong.streams import STREAMS, defaults_in_words, load_stream
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.method.adapter import PREVIOUS, RANDOM, VALIDATION
from qtuning_fast.method.class_gaussians import KINDS
from qtuning_fast.method.labels import PROBLEM_TYPES, SINGLE
from qtuning_fast.method.settings import check_settings, documented, from_file, setting, to_file

HEAD_STARTS = ("closed-form", "random", "probe")
HEAD_ENDS = ("mixed", "trained")


_OWN_DATA = {"validation_shots": Stream.validation_shots, "test_size": Stream.test_size}
"""What is drawn of the user's own data, and of most streams."""


@documented
@dataclass(frozen=True)
class DataOptions:
    """Where the tasks of a run come from: a stream, or the user's own data."""

    stream: str | None = setting(None, f"A stream of tasks: {', '.join(STREAMS)}.", "Give a stream or tasks, not both.")
    tasks: tuple[str, ...] = setting(
        (),
        "Your own task, name=path or path: CSV, TSV, JSONL, Parquet, a folder, images, a hub dataset. Repeat.",
        "See `load_task`.",
    )
    shots: int | None = setting(
        None, f"Training examples a class; default {Stream.shots}, of your own data and of image benchmarks all."
    )
    validation_shots: int | None = setting(
        None,
        f"Validation examples a class; {defaults_in_words('validation_shots', Stream.validation_shots)}.",
        "Once made, options say the number.",
    )
    test_size: int | None = setting(
        None, f"Test examples a task at most; {defaults_in_words('test_size', Stream.test_size)}."
    )
    seed: int = setting(0, "Random seed of the draw.")
    text_column: str = setting(
        "text", "Column of the texts in your own data.", "All tasks have the same.", absent="text"
    )
    label_column: str = setting(
        "label", "Column of the labels in your own data.", "All tasks have the same.", absent="label"
    )
    problem_types: tuple[str, ...] = setting(
        (),
        f"Type of your own labels, or name=type for one task: {', '.join(PROBLEM_TYPES[:-1])} or {PROBLEM_TYPES[-1]}. "
        "Repeat.",
        f"The default is {SINGLE}.",
        absent=(),
    )
    templates: tuple[str, ...] = setting(
        (),
        "What a language model reads, such as 'Review: {{text}}', or name=template for one task. Repeat.",
        "`{text}` is the example, and a backslash and an n are a new line. Default: the example alone, in a stream of "
        "texts that stream's own.",
        absent=(),
    )
    label_words: tuple[str, ...] = setting(
        (),
        "What a language model answers, class=word, or task/class=word for one task. Repeat.",
        "Default: the classes' names, in a stream of texts that stream's own words.",
        absent=(),
    )
    stream_data: str | None = setting(
        None,
        "A folder with a copy of the stream's data; default the hub.",
        "Of the image benchmarks: the files of the hub's dataset, what `save_to_disk` wrote, or a folder of images for "
        "each class. Of five-datasets a folder with a folder for each.",
        absent=None,
    )

    def __post_init__(self) -> None:
        stream = None if self.stream is None else STREAMS.get(self.stream)
        for name, own in _OWN_DATA.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, own if stream is None else getattr(stream, name))

    def load(self) -> list[Task]:
        """The tasks in order.

        Raises:
            ValueError, FileNotFoundError, ImportError: something is missing or wrong; the message names it.
        """
        return worded(self._load(), self.templates, self.label_words)

    def _load(self) -> list[Task]:
        if (self.stream is None) == (not self.tasks):
            raise ValueError("give either a stream or tasks of your own, and not both")
        sizes: dict[str, Any] = {
            "validation_shots": self.validation_shots,
            "test_size": self.test_size,
            "seed": self.seed,
        }
        columns: dict[str, Any] = {name: getattr(self, name) for name in _COLUMNS}
        if self.stream is None:
            if self.stream_data is not None:
                raise ValueError(f"stream_data is {self.stream_data!r}, but there is no stream; leave it out")
            kinds = self._problem_types()
            return [
                load_task(spec, shots=self.shots, **sizes, **columns, problem_type=kinds[parse_spec(spec)[0]])
                for spec in self.tasks
            ]
        if self.problem_types:
            raise ValueError(f"problem_types is {list(self.problem_types)}, but a stream has its own; leave it out")
        for name, column in columns.items():
            if column != getattr(_DEFAULTS, name):
                raise ValueError(f"{name} is {column!r}, but a stream has no columns; leave {name} out")
        return load_stream(self.stream, shots=self.shots, data=self.stream_data, **sizes)

    def _problem_types(self) -> dict[str, str]:
        """The problem type of each task by name."""
        names = [parse_spec(spec)[0] for spec in self.tasks]
        found: dict[str, str] = {}
        for given in self.problem_types:
            name, separator, kind = given.rpartition("=")
            if kind not in PROBLEM_TYPES:
                raise ValueError(f"problem_types has {given!r}; the types are {', '.join(PROBLEM_TYPES)}")
            if separator and name not in names:
                raise ValueError(f"problem_types has {given!r}, but the tasks are {', '.join(names)}")
            for each in [name] if separator else names:
                if found.setdefault(each, kind) != kind:
                    raise ValueError(f"problem_types gives task {each!r} two types, {found[each]} and {kind}")
        return {name: found.get(name, SINGLE) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, for `from_dict`."""
        return to_file(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataOptions:
        """The options of `to_dict`, also of an earlier version."""
        return from_file(cls, values)


_PROMPT_RATES = {"causal-lm": 3e-2, "text-to-text": 0.1}  # docs/language-models.md says how they were found
_COLUMNS = ("text_column", "label_column")
_DEFAULTS = DataOptions()


@documented
@dataclass(frozen=True)
class TrainingOptions:
    """The budget of one task, its learning rates, and where it starts; every task of a run has the same.

    The optimiser is AdamW without weight decay. Gradients are clipped at norm 1. A tenth of the steps warm up, then
    the rates decay along a cosine.

    Raises:
        TypeError, ValueError: an option has a wrong value; the message names the option.
    """

    steps: int = setting(
        100,
        "Steps a task at most; 0: none.",
        "Heads then stay as they start, and there are no prompts.",
        least=0,
    )
    epochs: int | None = setting(
        None,
        "Passes over a task's examples, in place of --steps.",
        "The last batch of a pass may be smaller.",
        absent=None,
    )
    batch_size: int = setting(16, "Examples a step.")
    eval_batch_size: int = setting(64, "Examples a batch when evaluating.")
    max_length: int = setting(64, "Tokens a text is cut to.", "A batch is padded to its longest text.")
    chat: bool = setting(
        False,
        "Put texts into the tokenizer's chat template.",
        "A text, in its task's template, is the user's message; the answer is the assistant's. For causal-lm.",
        absent=False,
    )
    augment: str | None = setting(
        None,
        "Changes of training images: {choices}.",
        "`crops`: random parts of at least 5% of the area, half of them mirrored. `crops-brightness`: of at least 8%, "
        "and of random brightness, as HiDe-Prompt learns CIFAR-100.",
        choices=(*AUGMENTATIONS, None),
        absent=None,
    )
    prompt_rate: float | None = setting(
        None,
        "Learning rate of prompts; default 3e-3 with heads, 3e-2 for causal-lm, 0.1 for text-to-text.",
        "It applies to the shared prompt too.",
    )
    reweighting_rate: float | None = setting(
        3e-2, "Learning rate of the reweighting.", "None: that of prompts.", absent=None
    )
    reweighting_pull: float = setting(
        0.1,
        "Weight of the pull on the reweighting; 0: off.",
        "It pulls to the weights at which the queue's rows start: 1 before any eviction.",
        absent=0.0,
    )
    head_rate: float | None = setting(
        None, "Learning rate of heads; default 1e-2 from random, else 1e-3.", "What starts well must not be destroyed."
    )
    start_from: str | None = setting(
        None,
        "random, previous, validation, or a task; default validation if heads start in closed form, else random.",
        "Where a prompt starts. `random`: random rows. `previous`: the previous task's prompt. A task's name: its "
        "prompt; tasks before it start at random. `validation`: random rows, unless the queue's mean or the prompt of "
        "one of the three likest tasks has less loss before any step, by more than one standard error.",
        absent="random",
    )
    head_start: str = setting(
        "closed-form",
        "{choices}.",
        "Where a head starts. `closed-form`: the Gaussian classifier of the features under the prompt's start; unless "
        "prompts start at random, mixed with heads of tasks with the same class names if that has less loss, by more "
        "than one standard error. `probe`: the tuned linear probe of the frozen model.",
        choices=HEAD_STARTS,
        absent="random",
    )
    head_end: str = setting(
        "mixed",
        "{choices}.",
        "Where a trained head ends. `trained`: as training leaves it. `mixed`: if each example has one class, the sum "
        "of that and of the closed form of training and validation examples under the trained prompt, both of norm 1.",
        choices=HEAD_ENDS,
        absent="trained",
    )
    gate_rate: float | None = setting(
        3e-2, "Learning rate of the gate.", "It applies to alpha and tau. None: that of prompts."
    )
    network_rate: float = setting(
        3e-4,
        "Learning rate of the reparametrisation.",
        "It applies to the discriminator too. At 1e-3 a prompt moves so far that other tasks' heads no longer fit the "
        "live queue.",
    )
    contrast: float = setting(
        0.0,
        "Weight of the contrastive regulariser; 0: off.",
        "It keeps features under a new prompt away from the class means of earlier tasks (HiDe-Prompt, arXiv "
        "2310.07234).",
        absent=0.0,
    )
    prompt_momentum: float = setting(
        0.0,
        "Share of the mean of earlier prompts in a new one, mixed in after training; 0: none.",
        "HiDe-Prompt's ensemble of prompts. Prompts must train as they are: `reparameterization` none.",
        absent=0.0,
    )
    joint_head: str | None = setting(
        None,
        "{choices}.",
        "Task-adaptive prediction (HiDe-Prompt): one head over the classes of all tasks, re-balanced after each on "
        "pseudo-features. A class is a Gaussian with its covariance, one with variances alone, or ten with variances "
        "around centroids. It answers where no task is named; each task's own head stays as it is.",
        choices=(*KINDS, None),
        absent=None,
    )
    joint_epochs: int = setting(30, "Passes over pseudo-features after each task.", "Each draws them anew.", absent=30)
    joint_rate: float = setting(5e-3, "Learning rate of the head over all classes.", absent=5e-3)
    eval_every: int = setting(20, "Steps between looks at the validation split.", "Each look also writes a checkpoint.")
    patience: int = setting(
        0, "Looks without a gain before a task stops; 0: never.", "The state of the best look is kept.", least=0
    )
    seed: int = setting(0, "Random seed of everything in the run.", least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.steps and self.head_start == "random":
            raise ValueError(
                "steps is 0, so a head would stay random; train it, or set head_start='probe' or 'closed-form'"
            )
        if self.prompt_momentum > 1:
            raise ValueError(f"prompt_momentum is {self.prompt_momentum}; it must be 1 at most")
        for name in ("contrast", "augment", "prompt_momentum"):
            if not self.steps and getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but steps is 0, so nothing is trained; leave it out"
                )
        if self.start_from == VALIDATION and self.head_start != "closed-form":
            raise ValueError(
                f"start_from is {VALIDATION!r}, which judges starts by heads in closed form, but head_start is "
                f"{self.head_start!r}; set it to 'closed-form', or start_from to {RANDOM!r} or {PREVIOUS!r}"
            )

    @property
    def starts_from(self) -> str:
        """Where prompts start: `start_from`, or its default."""
        if self.start_from is not None:
            return self.start_from
        return VALIDATION if self.head_start == "closed-form" else RANDOM

    def for_examples(self, count: int) -> TrainingOptions:
        """Return the options of a task with so many examples: epochs as steps, where steps may be taken."""
        if self.epochs is None or not self.steps:
            return self
        return replace(self, steps=self.epochs * -(-count // self.batch_size), epochs=None)

    def rates(self, task_type: str) -> dict[str, float]:
        """The learning rate of each kind of parameters (`QTuningModel.parameter_groups`), for a type of task."""
        prompts = _PROMPT_RATES.get(task_type, 3e-3) if self.prompt_rate is None else self.prompt_rate
        heads = 1e-2 if self.head_start == "random" else 1e-3
        return {
            "prompt": prompts,
            "reweighting": prompts if self.reweighting_rate is None else self.reweighting_rate,
            "gate": prompts if self.gate_rate is None else self.gate_rate,
            "head": heads if self.head_rate is None else self.head_rate,
            "network": self.network_rate,
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, for `from_dict`."""
        return to_file(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingOptions:
        """The options of `to_dict`, also of an earlier version."""
        return from_file(cls, values)
