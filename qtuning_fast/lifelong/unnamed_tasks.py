"""What a run measures of examples whose task nobody names: the block `class_incremental` of `metrics.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtuning_fast.lifelong.answers import Answering, AnswersOf, AsAsked, statistics_of
from qtuning_fast.lifelong.class_incremental import (
    Pairs,
    auroc,
    confusion,
    evaluation,
    first_of_each_class,
    found,
    joint_examples,
    joint_regression,
    label_accuracy,
    reliability,
)
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.evaluation import features
from qtuning_fast.lifelong.joint_head import JointHead
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.method.labels import SINGLE, class_count
from qtuning_fast.method.task_inference import FALSE_ALARM_RATE, FittedRule, TaskInference
from qtuning_fast.method.task_rule import TaskRule
from qtuning_fast.method.task_rules import ClosedForm, NearestMean
from qtuning_fast.model.model import QTuningModel

Stage = dict[str, Any]


class UnnamedTasks:
    """Records statistics of a run's tasks, and evaluates without their names.

    The features of the base model are computed once for each split of a task.

    Args:
        tasks: the tasks of the run.
        encoded: returns the encoded splits of a task.
        answers_of: see `AnswersOf`.
        as_asked: see `AsAsked`.
        batch_size: examples a batch.
        rule: chooses the task whose adapter answers.
        keeps_features: whether features of validation examples are kept for calibration.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        encoded: Callable[[Task], Mapping[str, EncodedExamples]],
        answers_of: AnswersOf,
        as_asked: AsAsked,
        batch_size: int,
        rule: TaskRule,
        *,
        keeps_features: bool = True,
    ) -> None:
        for task in tasks:
            rule.check(task.name, task.problem_type)
        self._keeps_features = keeps_features
        self.rule = rule
        self._tasks = tasks
        self._encoded = encoded
        self._answers_of = answers_of
        self._as_asked = as_asked
        self._batch_size = batch_size
        self._features: dict[tuple[str, str], Tensor] = {}

    @property
    def _own_answers(self) -> str | None:
        """What the answers of the rule itself are called, where they are not among the others."""
        told = isinstance(self.rule, ClosedForm | NearestMean) or not self.rule.needs_statistics
        return None if told else self.rule.name.replace("-", "_")

    def features(self, model: QTuningModel, task: Task, split: str) -> Tensor:
        """Return the features of a split without any task, `[n, F]`."""
        key = task.name, split
        if key not in self._features:
            self._features[key] = features(model, self._encoded(task)[split], self._batch_size, task=None)
        return self._features[key]

    def record(self, model: QTuningModel, number: int) -> None:
        """Record the statistics of a finished task."""
        task = self._tasks[number]
        train, validation = (
            (self.features(model, task, split), torch.from_numpy(self._classes(task, split)))
            for split in ("train", "validation")
        )
        kept = validation if self._keeps_features else None
        model.add_statistics(task.name, statistics_of(train, kept, _count(task), self.rule))

    def lack_statistics(self, model: QTuningModel, number: int) -> list[int]:
        """Return which of the tasks so far have no statistics, as after a run of an earlier version."""
        names = [task.name for task in self._tasks[: number + 1]]
        lacking = {*model.lacking_statistics(self.rule), *model.lacking_statistics(ClosedForm())}
        return [place for place, name in enumerate(names) if name in lacking]

    # After each task

    def stage(
        self, model: QTuningModel, number: int, previous: Stage | None, joint_head: JointHead | None = None
    ) -> Stage:
        """Evaluate on the test examples of each task so far, among all classes so far.

        Args:
            number: the number of the task learned last.
            previous: the result after the task before; None for the first. Adapters do not change, so an example is
                answered anew only where another task is inferred.
            joint_head: the head over all classes, if there is one.
        """
        tasks = self._tasks[: number + 1]
        names = [task.name for task in tasks]
        truths = [_pairs(place, self._classes(task, "test")) for place, task in enumerate(tasks)]
        rules = {
            "adapters": model.fit_task_rule(names, self.rule),
            "closed_form": model.fit_task_rule(names, ClosedForm()),
            "nearest_class_mean": model.fit_task_rule(names, NearestMean()),
        }
        inferred = {kind: [self._infer(model, fitted, task) for task in tasks] for kind, fitted in rules.items()}
        before = [*map(np.array, previous["answers"])] if previous is not None else []
        answers = {
            "adapters": [
                self._adapter_answers(model, task, each, earlier)
                for task, each, earlier in zip_longest(tasks, inferred["adapters"], before)
            ]
        } | {kind: [_most_probable(each) for each in inferred[kind]] for kind in ("closed_form", "nearest_class_mean")}
        if self._own_answers is not None:
            answers[self._own_answers] = [_most_probable(each) for each in inferred["adapters"]]
        if joint_head is not None:
            answers["joint_head"] = joint_head.answers(model, number, [each.places for each in inferred["adapters"]])
        label_names = [task.label_names if task.problem_type == SINGLE else [(task.name,)] for task in tasks]
        result: Stage = {
            "rule": self.rule.name,
            "answers": [pairs.tolist() for pairs in answers["adapters"]],
            "label_accuracy": {kind: label_accuracy(pairs, truths, label_names) for kind, pairs in answers.items()},
            **{kind: found(pairs, truths) for kind, pairs in answers.items()},
        }
        if number == len(self._tasks) - 1:
            result["at_end"] = self._at_end(model, rules["adapters"], inferred["adapters"], answers["adapters"], truths)
        return result

    def _infer(self, model: QTuningModel, fitted: FittedRule, task: Task) -> TaskInference:
        return self._answering(model).infer(fitted, self._encoded(task)["test"], self.features(model, task, "test"))

    def _answering(self, model: QTuningModel) -> Answering:
        return Answering(model, self._batch_size, self._answers_of, self._as_asked)

    def _adapter_answers(
        self, model: QTuningModel, task: Task, inference: TaskInference, earlier: Pairs | None
    ) -> Pairs:
        """Return what each test example of a task is taken for: the inferred task, and its adapter's answer.

        Args:
            earlier: the same after the task before; None for the task learned last.
        """
        chosen = inference.places.numpy()
        pairs = np.stack([chosen, np.zeros_like(chosen)], axis=1)
        anew = np.full(len(pairs), True) if earlier is None else earlier[:, 0] != chosen
        if earlier is not None:
            pairs[~anew] = earlier[~anew]
        examples = np.flatnonzero(anew)
        names = [self._tasks[chosen[each]].name for each in examples]
        outputs = self._answering(model).ask_each(names, self._encoded(task)["test"].subset(examples.tolist()))
        for each, output in zip(examples, outputs):
            if self._tasks[chosen[each]].problem_type == SINGLE:
                pairs[each, 1] = int(output.argmax())
        return pairs

    # After the last task

    def _at_end(
        self,
        model: QTuningModel,
        fitted: FittedRule,
        inferred: Sequence[TaskInference],
        answers: Sequence[Pairs],
        truths: Sequence[Pairs],
    ) -> dict[str, Any]:
        probabilities = torch.cat([each.task_probabilities for each in inferred]).numpy()
        right = torch.cat([each.places for each in inferred]).numpy() == np.concatenate(truths)[:, 0]
        return {
            "confusion": confusion(answers, len(self._tasks)),
            "calibration": {"temperature": fitted.temperature, **reliability(probabilities.max(1), right)},
            "unknown": self._unknown(model, inferred),
            "joint_regression": self._joint(model, truths),
        }

    def _unknown(self, model: QTuningModel, inferred: Sequence[TaskInference]) -> dict[str, Any]:
        """Return how well examples of no known task are told apart, with each task held out in turn."""
        names, several = [task.name for task in self._tasks], len(self._tasks) > 1
        areas, detected = [], []
        for task in self._tasks if several else ():
            fitted = model.fit_task_rule([name for name in names if name != task.name], ClosedForm())
            distances = {each.name: _distances(self._infer(model, fitted, each)) for each in self._tasks}
            held_out = distances.pop(task.name)
            areas.append(auroc(held_out, np.concatenate([*distances.values()])))
            detected.append(float((held_out > fitted.threshold(FALSE_ALARM_RATE)).mean()))
        threshold, told = inferred[0].threshold, bool(np.isfinite(inferred[0].threshold))
        known = torch.cat([each.is_known for each in inferred]).double()
        return {
            "false_alarm_rate": inferred[0].false_alarm_rate,
            "false_alarms": float(1 - known.mean()) if told else None,
            "threshold": threshold if told else None,
            "auroc": areas or None,
            "mean_auroc": float(np.mean(areas)) if areas else None,
            "detected": detected if told and detected else None,
            "mean_detected": float(np.mean(detected)) if told and detected else None,
        }

    def _joint(self, model: QTuningModel, truths: Sequence[Pairs]) -> dict[str, Any]:
        parts: dict[str, list[tuple[NDArray[np.float32], Pairs]]] = {"train": [], "validation": []}
        for place, task in enumerate(self._tasks):
            for split, chosen in parts.items():
                classes = self._classes(task, split)
                kept = first_of_each_class(classes, joint_examples(sum(map(_count, self._tasks))))
                chosen.append((self.features(model, task, split).numpy()[kept], _pairs(place, classes[kept])))
        train, validation = (
            (np.concatenate([x for x, _ in chosen]), np.concatenate([y for _, y in chosen]))
            for chosen in parts.values()
        )
        tests = [self.features(model, task, "test").numpy() for task in self._tasks]
        shares = found(joint_regression(train, validation, tests), truths)
        return {
            "accuracy": shares["accuracy"],
            "average_accuracy": float(np.mean(shares["accuracy"])),
            "task_found": float(np.mean(shares["task_found"])),
        }

    # All of it

    def summary(self, stages: Sequence[Stage]) -> dict[str, Any]:
        """Return the block of `metrics.json`, given the stage after each task."""
        last, at_end = stages[-1], stages[-1]["at_end"]
        kinds = {
            kind: evaluation([stage[kind] for stage in stages], share) for kind, share in last["label_accuracy"].items()
        }
        more = [kind for kind in kinds if kind not in ("adapters", "closed_form", "nearest_class_mean")]
        return {
            "rule": last["rule"],
            "classes": [_count(task) for task in self._tasks],
            "adapters": kinds["adapters"],
            **{kind: kinds[kind] for kind in more},
            "closed_form": kinds["closed_form"],
            "baselines": {
                "nearest_class_mean": kinds["nearest_class_mean"],
                "joint_regression": at_end["joint_regression"],
            },
            "confusion": at_end["confusion"],
            "calibration": at_end["calibration"],
            "unknown": at_end["unknown"],
        }

    def _classes(self, task: Task, split: str) -> NDArray[np.int64]:
        """Return the class of each example of a split; 0 if the task counts as one class."""
        labels = self._encoded(task)[split].columns["labels"].numpy()
        return labels.astype(np.int64) if task.problem_type == SINGLE else np.zeros(len(labels), dtype=np.int64)


def _count(task: Task) -> int:
    """Return the number of classes that a task of a run counts as; see `class_count`."""
    return class_count(task.problem_type, task.label_names)


def _pairs(task: int, classes: NDArray[np.int64]) -> Pairs:
    return np.stack([np.full_like(classes, task), classes], axis=1)


def _distances(inference: TaskInference) -> NDArray[np.float64]:
    assert inference.distances is not None
    return inference.distances.numpy()


def _most_probable(inference: TaskInference) -> Pairs:
    """Return the task and the class of the most probable class of each input."""
    pairs = np.array([(task, label) for task, size in enumerate(inference.classes) for label in range(size)])
    return pairs[inference.class_probabilities.argmax(1).numpy()]
