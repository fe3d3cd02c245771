"""Where a new task starts: from random rows, or from what finished tasks have learned.

What one task can give another is its prompt and its head. Whether that helps is not to be told from names, so a start
is chosen by its loss on the new task's own examples, before any step of training: a head in closed form is made from
the features under each candidate's rows, and judged on examples that it was not made from. Few examples say little, so
the first candidate, random rows, is left only for one whose loss is less by more than the standard error of the
difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtuning_fast.method.adapter import PREVIOUS, RANDOM, VALIDATION
from qtuning_fast.method.closed_form import LabelledFeatures, LinearHead, closed_form_head, judged_head
from qtuning_fast.method.labels import IGNORED, SINGLE, check_labels, class_count
from qtuning_fast.method.statistics import ClassMoments
from qtuning_fast.model.distributed import gathered_from, synchronize
from qtuning_fast.model.known_tasks import Batch
from qtuning_fast.model.output import batch_size, read_inputs
from qtuning_fast.model.tasks import Tasks
from qtuning_fast.model.training_prefix import TrainingPrefix

if TYPE_CHECKING:
    from qtuning_fast.model.model import QTuningModel

QUEUE_MEAN, PROMPT, CLOSED_FORM = "queue-mean", "prompt", "closed-form"

NEAREST = 3
"""How many finished tasks are tried at most."""

Rows = list[Tensor]
"""A new prompt, `[l, F]` a layer."""


@dataclass(frozen=True)
class Start:
    """Where a task starts.

    Attributes:
        rows: `"random"`, `"queue-mean"`, or `"prompt"`: that of a finished task.
        donor: this task; None for other rows, or if it has been removed.
        head: `"random"`, `"closed-form"`, or in a run `"probe"`; None for a language model, which has no heads.
        mixed_with: the finished tasks with the same classes whose heads are mixed into the closed form.
        loss: the mean loss on the new task's examples, each by a head that was not made from it; None if there were no
            examples to judge by.
    """

    rows: str
    donor: str | None
    head: str | None
    mixed_with: tuple[str, ...] = ()
    loss: float | None = None


@dataclass(frozen=True)
class ChosenStart:
    """The start of a task, and all that were considered, in the order in which they were tried."""

    chosen: Start
    considered: tuple[Start, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


class StartExamples:
    """Examples of a task that is about to start, and the features that the base model has of them.

    They are checked and read before the task starts: what does not fit is refused before anything has changed.

    Args:
        model: the model.
        name, label_names, problem_type: of the task.
        batches, validation: inputs by name, with `labels`.

    Raises:
        TypeError, ValueError: a batch is not one, or there is no example.
    """

    def __init__(
        self,
        model: QTuningModel,
        name: str,
        label_names: Sequence[str],
        problem_type: str,
        batches: Iterable[Batch],
        validation: Iterable[Batch],
    ) -> None:
        self._model, self._name = model, name
        self._label_names, self._problem_type = tuple(label_names), problem_type
        self._parts: list[list[Batch]] = [[], []]

        def checked() -> None:
            self._parts = [[self._checked(batch) for batch in part] for part in (batches, validation)]

        gathered_from(checked)
        self.base, _ = self.read(None)
        if not self._counting(self.base).any():
            raise ValueError(f"examples holds no example to start task {name!r} by; give some, or leave it out")

    def _checked(self, batch: Batch) -> Batch:
        """Return a batch with labels that have been checked."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"a batch is a {type(batch).__name__}; it must map names of inputs, and labels, to tensors")
        if "labels" not in batch:
            raise ValueError(f"a batch of examples has no labels; task {self._name!r} needs them to choose a start")
        labels = batch["labels"]
        labels = labels.cpu() if isinstance(labels, Tensor) else labels
        if self._model.has_heads:
            outputs = len(self._label_names)
            check_labels(labels, self._problem_type, (self._name,), (outputs,), batch_size(read_inputs(batch)))
        else:
            labels = self._model.backbone.checked_labels(labels, {key: _on_cpu(x) for key, x in batch.items()})
        return {**batch, "labels": labels}

    def _placed(self, batch: Batch) -> dict[str, Any]:
        device = self._model.device
        return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}

    def read(self, task: str | None) -> tuple[LabelledFeatures, LabelledFeatures | None]:
        """Return the features and labels of all processes' examples, and of the validation examples, under a task.

        Raises:
            ValueError: features are not finite.
        """
        processes = gathered_from(lambda: [self._features(part, task) for part in self._parts])
        examples, validation = (
            LabelledFeatures(*(torch.cat([each[kind] for each in part]) for kind in range(2)))
            for part in zip(*processes)
        )
        return examples, validation if len(validation) else None

    def _features(self, batches: Sequence[Batch], task: str | None) -> tuple[Tensor, Tensor]:
        found = [self._model.features(read_inputs(self._placed(batch)), task=task).cpu() for batch in batches]
        if not found:
            return torch.zeros(0, self._model.hidden_size), self._labels_of(None)
        features = torch.cat(found)
        if not features.isfinite().all():
            sample = int((~features.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"the features of example {sample} of task {self._name!r} are not finite; check its input")
        return features, torch.cat([self._labels_of(batch) for batch in batches])

    def _labels_of(self, batch: Batch | None) -> Tensor:
        """Return the labels of a batch, or of none, with one row a sample; zeros without heads."""
        if not self._model.has_heads:
            return torch.zeros(0 if batch is None else batch_size(batch), dtype=torch.long)
        if self._problem_type == SINGLE:
            return torch.zeros(0, dtype=torch.long) if batch is None else batch["labels"].reshape(-1).long()
        outputs = len(self._label_names)
        return torch.zeros(0, outputs) if batch is None else batch["labels"].reshape(-1, outputs).float()

    def _counting(self, examples: LabelledFeatures) -> Tensor:
        """Return whether each example counts, `[n]`."""
        if self._model.has_heads and self._problem_type == SINGLE:
            return examples.labels != IGNORED
        return torch.ones(len(examples), dtype=torch.bool)

    def moments(self) -> ClassMoments:
        """Return the moments of the base model's features."""
        counts = self._counting(self.base)
        classes = class_count(self._problem_type, self._label_names) if self._model.has_heads else 1
        labels = self.base.labels[counts] if classes > 1 else torch.zeros(int(counts.sum()), dtype=torch.long)
        return ClassMoments.of(self.base.features[counts], labels, classes)

    @torch.no_grad()
    def losses(self) -> Tensor:
        """Return a language model's mean loss of each example's tokens under the task that has started, `[n]`."""
        with self._model.evaluating():
            processes = gathered_from(lambda: [self._token_losses(batch) for part in self._parts for batch in part])
        return torch.cat([losses for mine in processes for losses in mine])

    def _token_losses(self, batch: Batch) -> Tensor:
        placed = self._placed(batch)
        logits, labels = self._model(**placed, use_cache=False).logits, placed["labels"]
        if not self._model.base_model.config.is_encoder_decoder:  # a token predicts the next one
            logits, labels = logits[:, :-1], labels[:, 1:]
        counts = labels != IGNORED
        losses = torch.zeros(labels.shape, dtype=torch.float64)
        losses[counts.cpu()] = F.cross_entropy(logits[counts].float(), labels[counts], reduction="none").double().cpu()
        return losses.sum(1) / counts.sum(1).clamp(min=1).cpu()


def _on_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def check_start(tasks: Tasks, start_from: object, *, has_examples: bool) -> None:
    """Raise a TypeError or ValueError if no task can start from there."""
    if not isinstance(start_from, str):
        raise TypeError(f"start_from is a {type(start_from).__name__}; it must be a string")
    if start_from == VALIDATION and not has_examples:
        raise ValueError(
            f"start_from is {VALIDATION!r}, which chooses by examples of the new task; give examples, or start from "
            f"{RANDOM!r}, {PREVIOUS!r} or a finished task"
        )
    if start_from not in (RANDOM, PREVIOUS, VALIDATION) and start_from not in tasks.adapters:
        raise ValueError(
            f"start_from is {start_from!r}; it must be {RANDOM!r}, {PREVIOUS!r}, {VALIDATION!r} or one of the "
            f"finished tasks: {', '.join(tasks.adapters) or 'none yet'}"
        )


@dataclass(frozen=True)
class Donors:
    """What finished tasks give a task that is about to start, read from disk where it lies there.

    Attributes:
        prompts: the rows that each trained, by task; of the task learned last they are there even if it was removed.
        heads: the heads of those with the same classes, in the order of the new ones.
    """

    prompts: dict[str | None, Rows] = field(default_factory=dict)
    heads: dict[str, LinearHead] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: QTuningModel,
        tasks: Tasks,
        start_from: str,
        label_names: Sequence[str],
        problem_type: str,
        examples: StartExamples | None,
    ) -> Donors:
        """Return those of the tasks that a start allows.

        Raises:
            ValueError: the task to start from has no prompt of its own.
        """
        prefix, names = model.training_prefix, list[str]()
        last, previous = model.learning.last_learned, prefix.prompts()
        if start_from == VALIDATION and examples is not None:
            able = [each.info.name for each in tasks.adapters.entries() if prefix.has_own_prompts(each.info)]
            names = tasks.known.nearest(examples.moments(), label_names, among=able, limit=NEAREST)
        elif start_from not in (RANDOM, PREVIOUS):
            names = [start_from]
        prompts: dict[str | None, Rows] = {name: prefix.own_prompts(tasks.adapters[name]) for name in names}
        if start_from == PREVIOUS and len(previous[0]):
            prompts[last] = previous
            names = [] if last is None or last not in tasks.adapters else [last]
        heads = {name: _head_of(tasks, name, label_names) for name in names} if problem_type == SINGLE else {}
        return cls(prompts, {name: head for name, head in heads.items() if head is not None})


def _head_of(tasks: Tasks, name: str, label_names: Sequence[str]) -> LinearHead | None:
    """Return the head of a finished task for the same classes, in their new order; None if it has none."""
    adapter = tasks.adapters[name]
    same = sorted(adapter.label_names) == sorted(label_names) and adapter.problem_type == SINGLE
    if not same or adapter.head_weight is None or adapter.head_bias is None:
        return None
    order = [adapter.label_names.index(label) for label in label_names]
    return LinearHead(adapter.head_weight[order].double(), adapter.head_bias[order].double())


@dataclass(frozen=True)
class _Tried:
    """A start with its rows, its head, and the loss of each example; there are none without examples."""

    start: Start
    rows: Rows
    head: LinearHead | None
    losses: Tensor


def choose_start(model: QTuningModel, start_from: str, donors: Donors, examples: StartExamples | None) -> ChosenStart:
    """Give the task that has just started, with random rows and a random head, the start that suits it best.

    Args:
        model: the model, whose task in training is set.
        start_from: see `QTuningModel.start_task`.
        donors: what finished tasks give it.
        examples: of the new task; without them the rows are those of `start_from`, and a head starts at random.

    Whatever an error comes from, the task has then started with the rows and the head that it had.
    """
    prefix, learning = model.training_prefix, model.learning
    random = prefix.prompts()
    try:
        tried = _tried(model, _sources(prefix, start_from, donors), donors, examples)
        best = _best(tried)
        prefix.start_prompts(best.rows)
        if best.head is not None:
            learning.set_head(best.head)
    except Exception:
        prefix.start_prompts(random)
        raise
    finally:
        model.set_task(learning.task)
    synchronize([parameter for parameter in model.parameters() if parameter.requires_grad])
    model.set_task(learning.task)
    return ChosenStart(best.start, tuple(each.start for each in tried))


def _tried(
    model: QTuningModel,
    sources: Sequence[tuple[str, str | None, Rows]],
    donors: Donors,
    examples: StartExamples | None,
) -> list[_Tried]:
    """Return each start with its losses, one after another on the model."""
    tried: list[_Tried] = []
    for kind, donor, rows in sources:
        model.training_prefix.start_prompts(rows)
        model.set_task(model.learning.task)
        if examples is not None and model.has_heads:
            tried += _with_heads(model, kind, donor, rows, donors, examples)
            continue
        losses = torch.zeros(0) if examples is None or len(sources) == 1 else examples.losses()
        head = "random" if model.has_heads else None
        tried.append(_Tried(Start(kind, donor, head, loss=_mean(losses)), rows, None, losses))
    return tried


def _sources(prefix: TrainingPrefix, start_from: str, donors: Donors) -> list[tuple[str, str | None, Rows]]:
    """Return the rows that the new prompt may start from: their kind, their task, and themselves."""
    random: list[tuple[str, str | None, Rows]] = [(RANDOM, None, prefix.prompts())]
    given = [(PROMPT, name, rows) for name, rows in donors.prompts.items()]
    if start_from != VALIDATION:
        return given or random
    mean = prefix.queue_mean()
    return [*random, *([] if mean is None else [(QUEUE_MEAN, None, mean)]), *given]


def _with_heads(
    model: QTuningModel, kind: str, donor: str | None, rows: Rows, donors: Donors, examples: StartExamples
) -> list[_Tried]:
    """Return the rows that are set with the heads that suit them.

    These are the closed form, and its mixture with the head of the task that the rows are from or, if they are of no
    task, with those of all donors.
    """
    outputs, problem_type = len(model.learning.label_names), model.learning.problem_type
    seen, validation = examples.read(model.learning.task)
    theirs = {name: head for name, head in donors.heads.items() if donor in (None, name)}

    def closed_form(some: LabelledFeatures) -> LinearHead:
        return closed_form_head(some.features, some.labels, outputs, problem_type)

    def mixed(some: LabelledFeatures) -> LinearHead:
        return closed_form(some).mixed(list(theirs.values()))

    tried = []
    for make, mixed_with in ((closed_form, ()), *([(mixed, tuple(theirs))] if theirs else [])):
        head, losses = judged_head(make, seen, validation, problem_type)
        tried.append(_Tried(Start(kind, donor, CLOSED_FORM, mixed_with, _mean(losses)), rows, head, losses))
    return tried


def _mean(losses: Tensor) -> float | None:
    return float(losses.mean()) if len(losses) else None


def _best(tried: Sequence[_Tried]) -> _Tried:
    """Return the start with the least loss of those that are surely better than the first; otherwise the first."""
    best, first = tried[0], tried[0].losses
    for each in tried[1:]:
        if len(first) < 2:
            break
        gain = first - each.losses
        if gain.mean() > gain.std() / len(gain) ** 0.5 and each.losses.mean() < best.losses.mean():
            best = each
    return best
