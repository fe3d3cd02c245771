"""Labels: what they mean, which are refused, and their loss, as transformers defines them.

Tasks with heads have a problem type:

| `problem_type` | labels of a batch of B | loss |
|---|---|---|
| `single_label_classification` | `[B]` or `[B, 1]` class indices of any integer type or bool | cross entropy |
| `multi_label_classification` | `[B, classes]` of 0 and 1, or numbers between | binary cross entropy |
| `regression` | `[B, outputs]`; `[B]` for one output | mean squared error |

-100 leaves out a label of either classification, where transformers ignores it for class indices only. In regression
it is a number like any other. Language models have token ids as labels; -100 leaves out a token. A batch in which every
label is left out has a loss of 0, not NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
SINGLE, MULTI, REGRESSION = PROBLEM_TYPES = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


def check_problem_type(problem_type: object) -> None:
    """Raise a ValueError if transformers knows no such problem type."""
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type is {problem_type!r}; it must be one of {', '.join(map(repr, PROBLEM_TYPES))}")


def class_count(problem_type: str, label_names: Sequence[str]) -> int:
    """Return the number of classes that inputs of a task are told apart by: 1 if an answer is not one of several."""
    return len(label_names) if problem_type == SINGLE and label_names else 1


def check_labels(labels: Tensor, problem_type: str, tasks: Sequence[str], outputs: Sequence[int], batch: int) -> None:
    """Check the labels of a batch.

    Types and shapes are checked everywhere, values only on the CPU: reading them from an accelerator would wait for it,
    and a compiled graph cannot read them.

    Args:
        labels: see the head of this module.
        problem_type: that of all samples.
        tasks, outputs: each sample's task and the number of its outputs, or those of the only task.
        batch: number of samples.

    Raises:
        TypeError: the labels are no tensor, or class indices are no integers.
        ValueError: the labels have a wrong shape, or a value is out of range.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}; it must be a tensor")
    if problem_type == SINGLE and (labels.is_floating_point() or labels.is_complex()):
        raise TypeError(
            f"labels is {labels.dtype} of shape {list(labels.shape)}, but {_said(tasks, outputs, problem_type)} and "
            f"takes class indices; for several labels a sample, start a task with problem_type={MULTI!r}; for "
            f"numbers, with problem_type={REGRESSION!r}"
        )
    most = 1 if problem_type == SINGLE else max(outputs)
    shapes = [[batch], [batch, 1]] if most == 1 else [[batch, most]]
    if list(labels.shape) not in shapes:
        raise ValueError(
            f"labels has shape {list(labels.shape)}, but {_said(tasks, outputs, problem_type)}; for a batch of {batch} "
            f"with problem_type={problem_type!r} it must be {' or '.join(map(str, shapes))}"
        )
    if labels.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        _check_values(labels.reshape(batch, most), problem_type, tasks, outputs)


def label_loss(logits: Tensor, labels: Tensor, problem_type: str, num_items: Tensor | int | None = None) -> Tensor:
    """Return the loss of checked labels, a scalar in float32.

    Args:
        logits: `[B, outputs]`; -inf where a sample's task has no such output, which does not count.
        labels: see the head of this module.
        problem_type: how they are read.
        num_items: what to divide the sum of losses by, as transformers.Trainer counts it over the batches of a step;
            None: the number of labels that count.
    """
    logits = logits.float()
    losses, counts = _losses(logits, labels.to(logits.device), problem_type)
    return losses.sum() / (counts.sum().clamp(min=1) if num_items is None else _divisor(num_items, logits.device))


def example_losses(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Return the loss of each example, `[B]`: the mean over its labels; 0 where all are left out."""
    losses, counts = _losses(logits, labels.to(logits.device), problem_type)
    losses, counts = losses.reshape(len(losses), -1), counts.reshape(len(losses), -1)
    return losses.sum(1) / counts.sum(1).clamp(min=1)


def _losses(logits: Tensor, labels: Tensor, problem_type: str) -> tuple[Tensor, Tensor]:
    """Return the loss of each label, `[B]` or `[B, outputs]`, 0 where it does not count, and whether it counts."""
    counts = counted(logits, labels, problem_type)
    if problem_type == SINGLE:
        losses = F.cross_entropy(logits, labels.reshape(-1).long(), reduction="none", ignore_index=IGNORED)
        return losses, counts
    logits = logits.masked_fill(~counts, 0.0)
    targets = labels.reshape(logits.shape).to(logits.dtype).masked_fill(~counts, 0.0)
    loss = F.binary_cross_entropy_with_logits if problem_type == MULTI else F.mse_loss
    return loss(logits, targets, reduction="none").masked_fill(~counts, 0.0), counts


def counted(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """Return whether each label counts in the loss, `[B]` or `[B, outputs]`."""
    if problem_type == SINGLE:
        return labels.reshape(-1).long() != IGNORED  # as uint8, -100 would be 156
    exists = ~logits.isneginf()
    return exists if problem_type == REGRESSION else exists & (labels.to(logits) != IGNORED)


def share_of_items(counts: Tensor, num_items: Tensor | int) -> Tensor:
    """Return the share of a step's `num_items` that the labels of this batch make up, a scalar."""
    return counts.sum() / _divisor(num_items, counts.device)


def _divisor(num_items: Tensor | int, device: torch.device) -> Tensor | int:
    """Return the number of items on the device; 1 instead of 0, where all sums are 0."""
    if isinstance(num_items, Tensor):
        num_items = num_items.to(device)
    return num_items + (num_items == 0)


def checked_tokens(labels: Tensor, vocabulary: int | None, shape: Sequence[int | None]) -> Tensor:
    """Return the token labels of a language model as int64; values are checked only on the CPU.

    Args:
        labels: `[B, N]`, token ids or -100.
        vocabulary: the number of tokens; None if it is unknown, so that the base model has to refuse what is too large.
        shape: `[B, N]`, with None for any length.

    Raises:
        TypeError: the labels are no tensor of token ids.
        ValueError: they have a wrong shape, or an id is out of range.
    """
    kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
    if not isinstance(labels, Tensor) or labels.dtype == torch.bool or labels.is_floating_point():
        raise TypeError(f"labels is {kind}, but a language model's labels must be token ids or {IGNORED}")
    if labels.ndim != 2 or any(size not in (None, found) for size, found in zip(shape, labels.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"labels has shape {list(labels.shape)}; token ids must have the shape [{wanted}]")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (labels < 0) & (labels != IGNORED)
        if vocabulary is not None:
            wrong |= labels >= vocabulary
        if wrong.any():
            size = "other tokens" if vocabulary is None else f"{vocabulary} tokens"
            raise ValueError(
                f"labels holds {int(labels[wrong][0])}, but this model has {size}; a label must be a token id from 0 "
                f"on, or {IGNORED} for none"
            )
    return labels.long()


def token_loss(loss: Tensor, counts: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Return the loss of a language model, given its mean over the tokens that count, which is NaN if none does.

    Args:
        loss: that mean, a scalar.
        counts: whether each label counts.
        num_items: see `label_loss`.
    """
    counts = counts.to(loss.device)
    loss = torch.where(counts.any(), loss, torch.zeros_like(loss))
    return loss if num_items is None else loss * share_of_items(counts, num_items)


def _check_values(labels: Tensor, problem_type: str, tasks: Sequence[str], outputs: Sequence[int]) -> None:
    """Raise a ValueError if a value of `[B, 1]` or `[B, outputs]` is out of range for its sample's task."""
    sizes = torch.tensor(outputs)[:, None]
    if problem_type == SINGLE:
        index = labels.long()
        right = (index == IGNORED) | ((index >= 0) & (index < sizes))
        wanted = f"a class index from 0 on, or {IGNORED} for none"
    elif problem_type == MULTI:
        most = torch.where(torch.arange(labels.shape[1]) < sizes, 1, 0)
        numbers = labels.float()
        right = (numbers == IGNORED) | ((numbers >= 0) & (numbers <= most))
        wanted = f"a number from 0 to 1 for each class, or {IGNORED} for none"
    else:
        right, wanted = labels.isfinite(), "finite numbers"
    if not right.all():
        sample = int((~right.all(1)).nonzero()[0])
        values, of = labels[sample].tolist(), sample if len(tasks) > 1 else 0
        raise ValueError(
            f"labels holds {values[0] if len(values) == 1 else values} for sample {sample}, but "
            f"{_said(tasks[of : of + 1], outputs[of : of + 1], problem_type)}; it must be {wanted}"
        )


def _said(tasks: Sequence[str], outputs: Sequence[int], problem_type: str) -> str:
    each = dict(zip(tasks, outputs))
    kind = ("output", "outputs") if problem_type == REGRESSION else ("class", "classes")
    return " and ".join(f"task {task!r} has {size} {kind[size != 1]}" for task, size in each.items())
