"""Where a new task starts: from random rows, or from what finished tasks have learned.

What one task can give another is its prompt and its head. Whether that helps is not to be told from names, so a start
is chosen by its loss on the new task's own examples, before any step of training: a head in closed form is made from
the features under each candidate's rows, and judged on examples that it was not made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qtuning_fast.method.adapter import PREVIOUS, RANDOM, VALIDATION
from qtuning_fast.method.closed_form import Examples, LinearHead, closed_form_head, judged_head
from qtuning_fast.method.labels import IGNORED, SINGLE, check_labels, class_count
from qtuning_fast.method.statistics import ClassMoments
from qtuning_fast.model.distributed import gathered
from qtuning_fast.model.known_tasks import Batch
from qtuning_fast.model.output import batch_size, read_inputs
from qtuning_fast.model.tasks import Tasks
from qtuning_fast.model.training_prefix import TrainingPrefix

if TYPE_CHECKING:
    from qtuning_fast.model.model import QTuningModel

QUEUE_MEAN, CLOSED_FORM = "queue mean", "closed form"

NEAREST = 3
"""How many finished tasks are tried at most."""


@dataclass(frozen=True)
class Start:
    """Where a task starts.

    Attributes:
        rows: `"random"`, `"queue mean"`, or the finished task whose own rows these are.
        head: `"random"` or `"closed form"`; None for a language model, which has no heads.
        mixed_with: the finished tasks with the same classes whose heads are mixed into the closed form.
        loss: the mean loss on the new task's examples, each by a head that was not made from it; None if there were no
            examples to judge by.
    """

    rows: str
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
        self._model, self._name, self._problem_type = model, name, problem_type
        self._label_names, self._outputs = tuple(label_names), len(label_names)
        self._batches, self._validation = ([self._checked(each) for each in part] for part in (batches, validation))
        self.base, _ = self.read(None)
        if not len(self.base):
            raise ValueError(f"examples holds no example to start task {name!r} by; give some, or leave it out")

    def _checked(self, batch: Batch) -> dict[str, Any]:
        """Return a batch on the model's device."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"a batch is a {type(batch).__name__}; it must map names of inputs, and labels, to tensors")
        if "labels" not in batch:
            raise ValueError(f"a batch of examples has no labels; task {self._name!r} needs them to choose a start")
        if self._model.has_heads:
            check_labels(
                batch["labels"], self._problem_type, (self._name,), (self._outputs,), batch_size(read_inputs(batch))
            )
        device = self._model.device
        return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items()}

    def read(self, task: str | None) -> tuple[Examples, Examples | None]:
        """Return the features and labels of all processes' examples, and of the validation examples, under a task."""
        mine = [self._features(part, task) for part in (self._batches, self._validation)]
        examples, validation = (
            Examples(torch.cat([features for features, _ in part]), torch.cat([labels for _, labels in part]))
            for part in zip(*gathered(mine))
        )
        return examples, validation if len(validation) else None

    def _features(self, batches: Sequence[dict[str, Any]], task: str | None) -> tuple[Tensor, Tensor]:
        found = [self._model.features(read_inputs(batch), task=task).cpu() for batch in batches]
        labels = [_labels_of(batch, self._problem_type, self._model.has_heads) for batch in batches]
        none = torch.zeros(0, self._model.hidden_size), torch.zeros(0, dtype=torch.long)
        return (torch.cat(found), torch.cat(labels)) if found else none

    def moments(self) -> ClassMoments:
        """Return the moments of the base model's features."""
        classes = class_count(self._problem_type, self._label_names) if self._model.has_heads else 1
        labels = self.base.labels if classes > 1 else torch.zeros(len(self.base), dtype=torch.long)
        counts = labels != IGNORED
        return ClassMoments.of(self.base.features[counts], labels[counts], classes)

    @torch.no_grad()
    def losses(self) -> Tensor:
        """Return a language model's mean loss of each example's tokens under the task that has started, `[n]`."""
        mine = [torch.zeros(0, dtype=torch.float64)]
        with self._model.evaluating():
            for batch in (*self._batches, *self._validation):
                logits, labels = self._model(**batch).logits.double(), batch["labels"]
                if self._model.base_model.config.is_encoder_decoder is not True:  # a token predicts the next one
                    logits, labels = logits[:, :-1], labels[:, 1:]
                each = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=IGNORED)
                mine.append((each.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)).cpu())
        return torch.cat([losses for part in gathered(mine) for losses in part])


def _labels_of(batch: Mapping[str, Any], problem_type: str, has_heads: bool) -> Tensor:
    """Return the labels of a batch, with one row a sample; of a language model, which has no classes, zeros."""
    labels: Tensor = batch["labels"].cpu()
    if not has_heads:
        return torch.zeros(batch_size(batch), dtype=torch.long)
    return labels.reshape(-1).long() if problem_type == SINGLE else labels


def check_start(tasks: Tasks, prefix: TrainingPrefix, start_from: object, *, has_examples: bool) -> None:
    """Raise a TypeError or ValueError if no task can start from there."""
    if not isinstance(start_from, str):
        raise TypeError(f"start_from is a {type(start_from).__name__}; it must be a string")
    if start_from == VALIDATION and not has_examples:
        raise ValueError(
            f"start_from is {VALIDATION!r}, which chooses by examples of the new task; give examples, or start from "
            f"{RANDOM!r}, {PREVIOUS!r} or a finished task"
        )
    if start_from not in (RANDOM, PREVIOUS, VALIDATION):
        if start_from not in tasks.adapters:
            raise ValueError(
                f"start_from is {start_from!r}; it must be {RANDOM!r}, {PREVIOUS!r}, {VALIDATION!r} or one of the "
                f"finished tasks: {', '.join(tasks.adapters) or 'none yet'}"
            )
        prefix.own_prompts(tasks.adapters[start_from])


def choose_start(
    model: QTuningModel,
    tasks: Tasks,
    start_from: str,
    examples: StartExamples | None,
    previous: Sequence[Tensor],
) -> ChosenStart:
    """Give the task that has just started, with random rows and a random head, the start that suits it best.

    Args:
        model: the model, whose task in training is set.
        tasks: its finished tasks.
        start_from: see `QTuningModel.start_task`.
        examples: of the new task; without them the rows are those of `start_from`, and a head starts at random.
        previous: the prompt of the task learned last, `[l, F]` a layer, which may be removed; empty before the first.
    """
    prefix, learning = model.training_prefix, model.learning
    assert learning.task is not None
    sources = _sources(model, tasks, start_from, examples, previous)
    donors = [source for source in sources if source in tasks.adapters]
    tried: list[_Tried] = []
    for source, rows in sources.items():
        prefix.start_prompts(rows)
        if examples is None:
            tried.append(_Tried(Start(source, "random" if model.has_heads else None), rows))
        elif model.has_heads:
            tried += _with_heads(model, tasks, source, donors, rows, examples)
        else:
            model.set_task(learning.task)
            tried.append(_Tried.of(source, None, (), rows, examples.losses()))
    best = _best(tried)
    prefix.start_prompts(best.rows)
    if best.head is not None:
        learning.set_head(best.head)
    model.set_task(learning.task)
    return ChosenStart(best.start, tuple(each.start for each in tried))


@dataclass(frozen=True)
class _Tried:
    """A start with its rows, its head, and the loss of each example; there are none without examples."""

    start: Start
    rows: list[Tensor]
    head: LinearHead | None = None
    losses: Tensor | None = None

    @classmethod
    def of(
        cls,
        source: str,
        kind: str | None,
        mixed_with: tuple[str, ...],
        rows: list[Tensor],
        losses: Tensor,
        head: LinearHead | None = None,
    ) -> _Tried:
        mean = float(losses.mean()) if len(losses) else None
        return cls(Start(source, kind, mixed_with, mean), rows, head, losses)


def _best(tried: Sequence[_Tried]) -> _Tried:
    """Return the start with the least loss of those that are surely better than the first; otherwise the first."""
    first = best = tried[0]
    for each in tried[1:]:
        if first.losses is None or each.losses is None or best.losses is None or len(first.losses) < 2:
            continue
        gain = first.losses - each.losses
        surely = gain.mean() > gain.std() / len(gain) ** 0.5
        if surely and each.losses.mean() < best.losses.mean():
            best = each
    return best


def _sources(
    model: QTuningModel, tasks: Tasks, start_from: str, examples: StartExamples | None, previous: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """Return the rows that the new prompt may start from, `[l, F]` a layer, by name."""
    prefix, learning = model.training_prefix, model.learning
    random = {RANDOM: prefix.prompts()}
    if start_from == RANDOM or (start_from == PREVIOUS and not len(previous[0])):
        return random
    if start_from == PREVIOUS:
        return {learning.last_learned or PREVIOUS: list(previous)}
    if start_from != VALIDATION:
        return {start_from: prefix.own_prompts(tasks.adapters[start_from])}
    assert examples is not None
    mean = prefix.queue_mean()
    able = [each.info.name for each in tasks.adapters.entries() if prefix.has_own_prompts(each.info)]
    nearest = tasks.known.nearest(examples.moments(), learning.label_names, among=able, limit=NEAREST)
    own = {name: prefix.own_prompts(tasks.adapters[name]) for name in nearest}
    return random | ({} if mean is None else {QUEUE_MEAN: mean}) | own


def _with_heads(
    model: QTuningModel,
    tasks: Tasks,
    source: str,
    donors: Sequence[str],
    rows: list[Tensor],
    examples: StartExamples,
) -> Iterator[_Tried]:
    """Yield the rows that are set with the heads that suit them.

    These are the closed form, and its mixture with the head of the task that the rows are from or, if they are of no
    task, with those of all `donors`.
    """
    learning = model.learning
    outputs, problem_type = len(learning.label_names), learning.problem_type
    seen, validation = examples.read(learning.task)
    heads = {name: _head_of(tasks, name, learning.label_names) for name in ([source] if source in donors else donors)}
    theirs = {name: head for name, head in heads.items() if head is not None and problem_type == SINGLE}

    def closed_form(some: Examples) -> LinearHead:
        return closed_form_head(some.features, some.labels, outputs, problem_type)

    def mixed(some: Examples) -> LinearHead:
        return closed_form(some).mixed(list(theirs.values()))

    head, losses = judged_head(closed_form, seen, validation, problem_type)
    yield _Tried.of(source, CLOSED_FORM, (), rows, losses, head)
    if theirs:
        head, losses = judged_head(mixed, seen, validation, problem_type)
        yield _Tried.of(source, CLOSED_FORM, tuple(theirs), rows, losses, head)


def _head_of(tasks: Tasks, name: str, label_names: Sequence[str]) -> LinearHead | None:
    """Return the head of a finished task for the same classes, in their new order; None if it has none."""
    adapter = tasks.adapters[name]
    same = sorted(adapter.label_names) == sorted(label_names) and adapter.problem_type == SINGLE
    if not same or adapter.head_weight is None or adapter.head_bias is None:
        return None
    order = [adapter.label_names.index(name) for name in label_names]
    return LinearHead(adapter.head_weight[order].double(), adapter.head_bias[order].double())
