"""A saved run, opened again to evaluate and predict."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import cast

from torch import Tensor

from qtuning_fast.lifelong.answers import Answering, InferredAnswer, answers_of_classes
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.data.encoding import Answers, ExampleEncoder
from qtuning_fast.lifelong.evaluation import features, task_score
from qtuning_fast.lifelong.joint_head import instructed_features, joint_head_file, read_joint_head
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.lifelong.run_folder import RUN_FILE
from qtuning_fast.lifelong.scores import METRICS
from qtuning_fast.lifelong.tasks import SPLITS, Examples, Task, data_digest
from qtuning_fast.lifelong.unnamed_tasks import UnnamedTasks
from qtuning_fast.method.closed_form import LinearHead
from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE
from qtuning_fast.method.task_inference import FittedRule
from qtuning_fast.model.checked_files import read_json
from qtuning_fast.model.checkpoint import CONFIG_FILE
from qtuning_fast.model.model import QTuningModel

SHARED, SHARED_HEAD = "shared", "joint_head"
"""What the settings of a run that is shared say more: that it is, and the file of the head over all classes."""

ADAPTERS, JOINT_HEAD, RULE = ANSWERS_BY = ("adapters", "joint-head", "rule")
"""What can answer if no task is named."""

# What answers for a method, by the name of its answers in the metrics. The joint regression is no part of a run.
_ANSWERS_BY = {"joint_head": JOINT_HEAD, "nearest_class_mean": RULE, "ranpac": RULE}


class SavedRun:
    """The stored adapters of a run, ready to evaluate and predict; the run may be one that was pulled from the hub.

    Args:
        folder: the folder of the run; with several seeds, the first seed is opened.
        task_rule: the rule that infers tasks, by name; None: that of the run.
        lazy: read each adapter when it is first needed.
        answers_by: what answers if no task is named: `"adapters"`, `"joint-head"` (one head over all classes, if the
            run has one), or `"rule"`, the most probable class of the rule itself; None: that of the run's method.

    Raises:
        FileNotFoundError: the folder holds no run, or no task of the run is finished.
        ValueError: a file is damaged, or there is no such rule.
    """

    def __init__(
        self, folder: Path, *, task_rule: str | None = None, answers_by: str | None = None, lazy: bool = False
    ) -> None:
        self.folder = run_folder(folder)
        settings = read_json(self.folder / RUN_FILE)
        self.options = TrainingOptions.from_dict(settings["training"])
        self._about, self._digests = settings["about"], settings["tasks"]
        self._words, self._templates = settings.get("label_words", {}), settings.get("templates", {})
        self._keeps_features = settings.get("keep_validation_features", True)
        if not {"base_model", "data"} <= self._about.keys():
            raise ValueError(
                f"{folder}: this run was started from Python; open its adapters with QTuningModel.from_pretrained"
            )
        if self._about["base_model"] is None:
            raise ValueError(
                f"{folder}: the base model of this run was a folder of its author; pull the run again, with "
                "--base-model and where you have that model"
            )
        self.data = DataOptions.from_dict(self._about["data"])
        self._shared_head = settings.get(SHARED_HEAD)
        task_type = settings["method"]["task_type"]
        base_model, processor = load_base_model(self._about["base_model"], task_type)
        self.encoder = ExampleEncoder(processor, task_type, self.options.max_length, chat=self.options.chat)
        self.model = QTuningModel.from_pretrained(base_model, adapter_folder(self.folder), lazy=lazy).eval()
        if task_rule is not None:
            self.model.task_rule = task_rule
        self.answers_by = answers_by or _ANSWERS_BY.get(self._about.get("answered_by"), ADAPTERS)
        if self.answers_by not in ANSWERS_BY:
            raise ValueError(f"answers_by is {answers_by!r}; it must be one of {', '.join(ANSWERS_BY)}")
        self._answering = Answering(self.model, self.options.eval_batch_size, self.answers_of, self.as_asked)

    def load_tasks(self) -> list[Task]:
        """Load the finished tasks of the run again.

        Raises:
            ValueError: the data of a task has changed since the run, or is not at hand.
            FileNotFoundError, ImportError, ConnectionError: see `DataOptions.load`.
        """
        try:
            tasks = [task for task in self.data.load() if task.name in self.model.adapters]
        except FileNotFoundError as error:  # what else goes wrong is the reader's to mend
            if not self._about.get(SHARED):
                raise
            raise ValueError(
                f"{self.folder}: the examples of this run stayed with its author ({error}); eval takes others with "
                "--data"
            ) from None
        for task in tasks:
            if data_digest(task) != self._digests.get(task.name):
                raise ValueError(
                    f"the data of task {task.name!r} has changed since the run, so its examples are not at hand; eval "
                    "takes others with --data"
                )
        return tasks

    def predict(self, inputs: Sequence[str], task: str) -> Tensor:
        """Probabilities `[inputs, classes]` of texts, or of images by path, under the adapter of a task.

        A language model chooses among the words for the classes. Regression has no probabilities, but a number for each
        input, `[inputs, 1]`.
        """
        return self._answering.ask(task, self._encoded(inputs))

    def infer(self, inputs: Sequence[str], *, top_k: int = 1) -> list[InferredAnswer]:
        """Answers to texts, or to images by path, whose task is inferred.

        Args:
            inputs: the texts or the paths.
            top_k: ask the adapters of so many tasks, the likeliest, and take the most probable answer of all.

        Raises:
            ValueError: no task has statistics, or `top_k` is invalid.
        """
        return self.infer_encoded(self._encoded(inputs), top_k)

    def infer_encoded(self, encoded: EncodedExamples, top_k: int = 1) -> list[InferredAnswer]:
        """Answers to encoded examples whose task is inferred; see `infer`."""
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        fitted = self.fitted()
        inference = self._answering.infer(fitted, encoded, features(self.model, encoded, self._batch_size, task=None))
        if self.answers_by == ADAPTERS:
            return self._answering.answer(inference, encoded, top_k=top_k)
        if top_k != 1:
            raise ValueError(f"top_k is {top_k}, but {self.answers_by} answers, not several adapters; leave it out")
        if self.answers_by == RULE:
            return self._with_outputs(answers_of_classes(inference.class_probabilities, inference), encoded)
        head = self._joint_head()
        x = instructed_features(self.model, encoded, inference.task_names, self._batch_size)
        return answers_of_classes(head(x).softmax(1), inference)

    def _with_outputs(self, answers: list[InferredAnswer], encoded: EncodedExamples) -> list[InferredAnswer]:
        """Return the answers, with an adapter's output where a task is no choice among classes, as for a rule it is."""
        places = [n for n, answer in enumerate(answers) if self.model.problem_type(answer.task) != SINGLE]
        outputs = self._answering.ask_each([answers[n].task for n in places], encoded.subset(places))
        for place, output in zip(places, outputs):
            answers[place] = replace(answers[place], output=output)
        return answers

    def _joint_head(self) -> LinearHead:
        if self.left_out:
            raise ValueError(
                f"{self.folder}: the head over all classes needs every task to be inferred, but "
                f"{', '.join(self.left_out)} cannot be; record them with `{self.statistics_command}`"
            )
        tasks = self.model.tasks
        found = (self.folder, self._shared_head) if self._shared_head else joint_head_file(self.folder, len(tasks))
        if found is None:
            raise ValueError(
                f"{self.folder} has no head over all classes after {len(tasks)} tasks, which a run has with "
                "--joint-head; ask the adapters (--answers-by adapters)"
            )
        classes = sum(len(self.model.label_names(name)) for name in tasks)
        return read_joint_head(*found, classes=classes, features=self.model.hidden_size)

    def fitted(self) -> FittedRule:
        """The rule that infers tasks, fitted to all of them.

        Raises:
            ValueError: no task can be inferred.
        """
        if not self.infers:
            raise ValueError(self.no_inference)
        return self.model.fit_task_rule()

    @property
    def infers(self) -> bool:
        """Whether tasks can be inferred."""
        return len(self.left_out) < len(self.model.tasks)

    @property
    def no_inference(self) -> str:
        """Why tasks cannot be inferred, and what to do."""
        return (
            f"{self.folder} holds no statistics by which rule {self.model.task_rule.name!r} infers the task of an "
            f"input; record them with `{self.statistics_command}`, or name the task with --task"
        )

    @property
    def statistics_command(self) -> str:
        """The command that records what is lacking."""
        rule = self.model.task_rule
        return f"qtuning-fast statistics --run {shlex.quote(str(self.folder))}" + (
            f" --task-rule {rule.name}" if rule.has_own_features else ""
        )

    @property
    def left_out(self) -> list[str]:
        """The tasks that cannot be inferred, because they have not the statistics that the rule needs."""
        return self.model.lacking_statistics()

    def record_statistics(self) -> list[str]:
        """Record the statistics of the finished tasks that have none, from the run's own examples, and save them.

        Returns:
            The names of these tasks.

        Raises:
            ValueError: the data of a task has changed since the run.
        """
        lacking = self.left_out
        tasks = self.load_tasks() if lacking else []
        splits: dict[str, dict[str, EncodedExamples]] = {}

        def encoded(task: Task) -> dict[str, EncodedExamples]:
            if task.name not in splits:
                splits[task.name] = {split: self.encoder.encode(getattr(task, split)) for split in SPLITS}
            return splits[task.name]

        unnamed = UnnamedTasks(
            tasks,
            encoded,
            self.answers_of,
            self.as_asked,
            self._batch_size,
            self.model.task_rule,
            keeps_features=self._keeps_features,
        )
        for number, task in enumerate(tasks):
            if task.name in lacking:
                unnamed.record(self.model, number)
        if lacking:
            self.model.save_pretrained(adapter_folder(self.folder))
        return lacking

    def answer(self, predicted: Tensor, task: str) -> str:
        """One row of `predict` in words: the most probable class, the labels above one half, or the number."""
        names, kind = self.model.label_names(task), self.model.problem_type(task)
        if kind == REGRESSION:
            return f"{names[0]} {float(predicted[0]):.3g}"
        if kind == MULTI:
            given = [f"{name} ({p:.0%})" for name, p in zip(names, predicted.tolist()) if p > 0.5]
            return ", ".join(given) or f"none of {', '.join(names)}"
        return f"{names[int(predicted.argmax())]} ({float(predicted.max()):.0%})"

    def in_words(self, found: InferredAnswer) -> str:
        """An answer whose task was inferred, in words."""
        others = ", ".join(f"{name} {p:.0%}" for name, p in found.runners_up[:3])
        words = f"{found.task}: {self.answer(found.output, found.task)}; task {found.task_probability:.0%}"
        if self.model.problem_type(found.task) == SINGLE:
            words += f", both {found.probability:.0%}"
        words += f" (other tasks: {others})" if others else ""
        return words if found.is_known else f"no known task; the nearest is {words}"

    def metric(self, task: str) -> str:
        """The name of the measure of a task (`qtuning_fast.lifelong.scores`)."""
        return METRICS[self.model.problem_type(task)]

    def score(self, examples: Examples, task: str) -> float:
        """How well the adapter of a task answers the examples, by the task's `metric`.

        Raises:
            ValueError: the examples are images but the run reads texts, or the other way round.
        """
        self._check_kind(examples, task)
        encoded, problem_type = self.as_asked(task, self.encoder.encode(examples)), self.model.problem_type(task)
        with self.model.keeping_task():
            self.model.set_task(task)
            return task_score(self.model, encoded, self._batch_size, self.answers_of(task), problem_type)

    def score_unnamed(self, examples: Examples, task: str, *, top_k: int = 1) -> dict[str, float]:
        """How well examples of a task are answered if nobody names it.

        Returns:
            `task_found`, the share whose task is inferred; `accuracy`, the share for which task and class are right;
            `known`, the share that is not said to be of no known task.
        """
        self._check_kind(examples, task)
        single = self.model.problem_type(task) == SINGLE
        answers = self.infer_encoded(self.encoder.encode(examples), top_k)
        right = [
            answer.task == task and (not single or int(answer.output.argmax()) == label)
            for answer, label in zip(answers, examples.labels)
        ]
        return {
            "task_found": fmean(answer.task == task for answer in answers),
            "accuracy": fmean(right),
            "known": fmean(answer.is_known for answer in answers),
        }

    @property
    def label_names(self) -> list[str]:
        """The names of the classes of all tasks, each once.

        Raises:
            ValueError: no task has classes.
        """
        single = [name for name in self.model.tasks if self.model.problem_type(name) == SINGLE]
        if not single:
            raise ValueError("no task of this run has classes to compare by name; name a task with --task")
        return list(dict.fromkeys(label for name in single for label in self.model.label_names(name)))

    def score_by_label(self, examples: Examples, *, top_k: int = 1) -> dict[str, float]:
        """How well examples of any tasks are answered, judged by the names of their labels.

        Args:
            examples: their labels are places in `label_names`.
            top_k: see `infer`.

        Returns:
            `accuracy`, the share of answers with the right label name; `known`, as in `score_unnamed`.
        """
        self._check_kind(examples, self.model.tasks[0])
        answers, names = self.infer_encoded(self.encoder.encode(examples), top_k), self.label_names
        right = [
            self.model.problem_type(answer.task) == SINGLE
            and self.model.label_names(answer.task)[int(answer.output.argmax())] == names[cast(int, label)]
            for answer, label in zip(answers, examples.labels)
        ]
        return {"accuracy": fmean(right), "known": fmean(answer.is_known for answer in answers)}

    def _check_kind(self, examples: Examples, task: str) -> None:
        if isinstance(examples.inputs[0], str) == self.encoder.reads_images:
            kinds = ("images", "texts") if self.encoder.reads_images else ("texts", "images")
            raise ValueError(f"task {task!r} reads {kinds[0]}, but these examples are {kinds[1]}")

    def _encoded(self, inputs: Sequence[str]) -> EncodedExamples:
        given = [Path(each) if self.encoder.reads_images else each for each in inputs]
        return self.encoder.encode(Examples(given, [0] * len(given)))

    @property
    def _batch_size(self) -> int:
        return self.options.eval_batch_size

    def as_asked(self, task: str, examples: EncodedExamples) -> EncodedExamples:
        """Examples as a task asks its adapter about them; see `AsAsked`."""
        return self.encoder.as_asked(examples, self._templates.get(task))

    def answers_of(self, task: str) -> Answers | None:
        """The tokens of a language model's words for the classes of a task; None for models with heads."""
        return self.encoder.encode_answers(self._words.get(task, ()), task=task)


def adapter_folder(run: Path) -> Path:
    """Return the folder of a run's adapters: its own, where the run was pulled from the hub."""
    return run if (run / CONFIG_FILE).is_file() else run / "adapter"


def run_folder(folder: Path) -> Path:
    """Return the folder of a run or, with several seeds, of the first.

    Raises:
        FileNotFoundError: there is none.
    """
    seeds = files_by_seed(folder, RUN_FILE)
    if not (folder / RUN_FILE).is_file() and not seeds:
        raise FileNotFoundError(f"{folder} holds no run")
    return folder if (folder / RUN_FILE).is_file() else seeds[0].parent


def files_by_seed(folder: Path, file: str) -> list[Path]:
    """Return a file of each seed's run below a folder, by seed."""
    found = [path for path in folder.glob(f"seed-*/{file}") if path.parent.name.removeprefix("seed-").isdigit()]
    return sorted(found, key=lambda path: int(path.parent.name.removeprefix("seed-")))
