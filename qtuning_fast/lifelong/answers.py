"""Answers to examples whose task nobody names: it is inferred and its adapter answers, or a class of all is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.evaluation import probabilities
from qtuning_fast.method.labels import SINGLE
from qtuning_fast.method.statistics import Recorder, TaskStatistics
from qtuning_fast.method.task_inference import FittedRule, TaskInference
from qtuning_fast.method.task_rule import Evidence, TaskRule
from qtuning_fast.model.distributed import from_first
from qtuning_fast.model.model import QTuningModel
from qtuning_fast.model.scoring import Answers

AnswersOf = Callable[[str], Answers | None]
"""Returns the answers of a task, one a class, if a language model gives them."""

AsAsked = Callable[[str, EncodedExamples], EncodedExamples]
"""Returns examples as a task asks its adapter about them: a language model reads them in the task's template."""


@dataclass(frozen=True)
class InferredAnswer:
    """The answer to one example.

    Attributes:
        task: the task whose adapter answers.
        output: its probabilities of the classes or of the labels, or the numbers that it predicts, `[outputs]`.
        task_probability: its `p(t|x)`.
        probability: `p(t|x) p_t(c|x)` of the answer; `p(t|x)` if it is not one class of several.
        runners_up: other tasks and their `p(t|x)`, the likeliest first.
        is_known: whether the example seems to be of any known task.
    """

    task: str
    output: Tensor
    task_probability: float
    probability: float
    runners_up: tuple[tuple[str, float], ...]
    is_known: bool


class Answering:
    """Infers the tasks of encoded examples, and asks the adapters.

    Args:
        model: a model with finished tasks.
        batch_size: examples a batch.
        answers_of: see `AnswersOf`.
        as_asked: see `AsAsked`.
    """

    def __init__(self, model: QTuningModel, batch_size: int, answers_of: AnswersOf, as_asked: AsAsked) -> None:
        self._model = model
        self._batch_size = batch_size
        self._answers_of = answers_of
        self._as_asked = as_asked

    def infer(self, fitted: FittedRule, examples: EncodedExamples, features: Tensor) -> TaskInference:
        """Return which task each example is of.

        Args:
            fitted: the rule, fitted to tasks of the model.
            examples: the examples.
            features: theirs under no task, `[n, F]`.
        """

        def ask_adapters() -> Mapping[str, Tensor]:
            return {name: self.ask(name, examples) for name in fitted.order}

        inference = fitted.infer(Evidence(features, ask_adapters))
        return from_first(lambda: inference)  # what is asked next must be the same in all processes

    def ask(self, task: str, examples: EncodedExamples) -> Tensor:
        """Return what the adapter of a task gives for each example: `[n, outputs]` as in `InferredAnswer.output`."""
        with self._model.keeping_task():
            self._model.set_task(task)
            kind, asked = self._model.problem_type(task), self._as_asked(task, examples)
            return probabilities(self._model, asked, self._batch_size, self._answers_of(task), kind)

    def ask_each(self, tasks: Sequence[str], examples: EncodedExamples) -> list[Tensor]:
        """Return what its task's adapter gives for each example, `[outputs]` each."""
        found: list[Tensor] = [torch.empty(0)] * len(tasks)
        for task in dict.fromkeys(tasks):
            places = [place for place, name in enumerate(tasks) if name == task]
            for place, output in zip(places, self.ask(task, examples.subset(places))):
                found[place] = output
        return found

    def answer(self, inference: TaskInference, examples: EncodedExamples, *, top_k: int = 1) -> list[InferredAnswer]:
        """Return the answer to each example.

        Args:
            inference: which task each example is of.
            examples: the examples.
            top_k: as in `QTuningModel.forward`, and for language models too.
        """
        asked = [self.ask_each(tasks, examples) for tasks in self.to_ask(inference, top_k)]
        return self.choose(inference, asked)

    def to_ask(self, inference: TaskInference, top_k: int) -> list[list[str]]:
        """Return the likeliest task of each example, then the next one of each, and so on, as far as there are some."""
        ranked = inference.top(len(inference.tasks))
        return [[tasks[k][0] for tasks in ranked] for k in range(min(top_k, len(inference.tasks)))]

    def choose(self, inference: TaskInference, asked: Sequence[Sequence[Tensor]]) -> list[InferredAnswer]:
        """Return the answer to each example.

        Args:
            inference: which task each example is of.
            asked: what the adapters of `to_ask` give for each example.
        """
        ranked = inference.top(len(inference.tasks))
        single = [[self._is_single(name) for name, _ in tasks[: len(asked)]] for tasks in ranked]
        sureness = [[float(outputs[place].max()) for outputs in asked] for place in range(len(ranked))]
        best = inference.surest(len(asked), torch.tensor(sureness, dtype=torch.float64), torch.tensor(single)).tolist()
        answers = []
        for place, (tasks, k, known) in enumerate(zip(ranked, best, inference.is_known.tolist())):
            task, p = tasks[k]
            answer_given_task = sureness[place][k] if single[place][k] else 1.0
            others = tuple(each for each in tasks if each[0] != task)
            answers.append(InferredAnswer(task, asked[k][place], p, p * answer_given_task, others, known))
        return answers

    def _is_single(self, task: str) -> bool:
        return self._model.problem_type(task) == SINGLE


def answers_of_classes(probabilities: Tensor, inference: TaskInference) -> list[InferredAnswer]:
    """Return the answer to each example, given a probability for each class of all tasks.

    Args:
        probabilities: `[n, C]`, the classes of the first task, then those of the second, and so on.
        inference: which task each example is of; it says what the tasks are, and what is known.
    """
    by_task = torch.stack([each.sum(1) for each in probabilities.split(inference.classes, dim=1)], dim=1)
    first = [0, *accumulate(inference.classes)]
    task_of = torch.repeat_interleave(torch.arange(len(inference.tasks)), torch.tensor(inference.classes))
    answers = []
    for p, tasks, known in zip(probabilities, by_task, inference.is_known.tolist()):
        best = int(p.argmax())
        place = int(task_of[best])
        within = p[first[place] : first[place + 1]]
        others = tuple((inference.tasks[n], float(tasks[n])) for n in tasks.argsort(descending=True).tolist())
        answers.append(
            InferredAnswer(
                inference.tasks[place],
                within / within.sum(),
                float(tasks[place]),
                float(p[best]),
                tuple(each for each in others if each[0] != inference.tasks[place]),
                known,
            )
        )
    return answers


def statistics_of(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor] | None, classes: int, rule: TaskRule
) -> TaskStatistics:
    """Return the statistics of a task.

    Args:
        train, validation: features under no task, `[n, F]`, and class indices, `[n]`; no validation, no calibration.
        classes: the number of classes that the task counts as.
        rule: a rule that may need moments of its own.
    """
    recorder = Recorder(classes, rule.maps)
    recorder.add(*train)
    return recorder.finish([] if validation is None else [validation])
