"""Labels: each problem type has the loss of transformers, and what fits none is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from qtuning_fast.method.labels import (
    MULTI,
    PROBLEM_TYPES,
    REGRESSION,
    SINGLE,
    check_labels,
    check_problem_type,
    checked_tokens,
    counted,
    label_loss,
    share_of_items,
    token_loss,
)

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(4, 3, generator=GENERATOR)
TARGETS = torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]])
LABELS = {SINGLE: torch.tensor([0, 2, 1, 2]), MULTI: TARGETS, REGRESSION: torch.randn(4, 3, generator=GENERATOR)}


def loss(labels: Tensor, problem_type: str, logits: Tensor = LOGITS, **more: Any) -> Tensor:
    check_labels(labels, problem_type, ("topics",), (logits.shape[1],), len(logits))
    return label_loss(logits, labels, problem_type, **more)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_transformers(problem_type: str, dtype: torch.dtype) -> None:
    config = SimpleNamespace(num_labels=3, problem_type=problem_type)
    expected = ForSequenceClassificationLoss(LABELS[problem_type], LOGITS.to(dtype).float(), config)
    found = loss(LABELS[problem_type], problem_type, LOGITS.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_one_number_a_sample_is_regressed_as_in_transformers() -> None:
    logits, labels = LOGITS[:, :1], torch.tensor([0.5, 2, -100, 1])
    expected = ForSequenceClassificationLoss(labels, logits, SimpleNamespace(num_labels=1, problem_type=REGRESSION))
    for given in (labels, labels[:, None]):
        torch.testing.assert_close(loss(given, REGRESSION, logits), expected)
    whole = torch.tensor([1, 2, 0, 3])
    torch.testing.assert_close(loss(whole, REGRESSION, logits), F.mse_loss(logits[:, 0], whole.float()))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integers_of_any_size_mean_the_index(dtype: torch.dtype) -> None:
    expected = F.cross_entropy(LOGITS, LABELS[SINGLE])
    torch.testing.assert_close(loss(LABELS[SINGLE].to(dtype), SINGLE), expected)
    torch.testing.assert_close(loss(LABELS[SINGLE].to(dtype)[:, None], SINGLE), expected)


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_no_class_and_no_token_is_taken_for_a_label_that_is_left_out(problem_type: str) -> None:
    wraps = torch.tensor([256 - 100], dtype=torch.uint8)  # -100 in eight bits
    assert checked_tokens(wraps[None], 200, [1, 1]).tolist() == [[156]]
    logits = torch.randn(1, 200)
    if problem_type == SINGLE:
        torch.testing.assert_close(loss(wraps, SINGLE, logits), F.cross_entropy(logits, wraps.long()))
    else:
        with pytest.raises(ValueError, match="labels holds"):
            loss(wraps.expand(1, 200), MULTI, logits)


def test_booleans_mean_the_second_class() -> None:
    yes = torch.tensor([True, False, False, True])
    torch.testing.assert_close(loss(yes, SINGLE), F.cross_entropy(LOGITS, yes.long()))
    torch.testing.assert_close(loss(TARGETS.bool(), MULTI), loss(TARGETS, MULTI))
    torch.testing.assert_close(loss(TARGETS.int(), MULTI), loss(TARGETS, MULTI))


def test_a_label_that_is_left_out_does_not_count() -> None:
    labels = torch.tensor([0, -100, 1, -100])
    torch.testing.assert_close(loss(labels, SINGLE), F.cross_entropy(LOGITS[[0, 2]], labels[[0, 2]]))
    targets = TARGETS.clone()
    targets[0, 1] = targets[3] = -100
    kept = targets != -100
    expected = F.binary_cross_entropy_with_logits(LOGITS[kept], targets[kept])
    torch.testing.assert_close(loss(targets, MULTI), expected)


@pytest.mark.parametrize("labels", [torch.full((4,), -100), torch.full((4, 3), -100.0)], ids=["class", "classes"])
def test_a_batch_without_any_label_has_a_loss_of_zero(labels: Tensor) -> None:
    logits = LOGITS.clone().requires_grad_()
    problem_type = SINGLE if labels.ndim == 1 else MULTI
    for num_items in (None, 0, 5):
        found = loss(labels, problem_type, logits, num_items=num_items)
        assert found == 0
        assert not torch.autograd.grad(found, logits)[0].any()


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_parts_of_a_batch_add_up_to_its_mean(problem_type: str, as_tensor: bool) -> None:
    labels = LABELS[problem_type].clone()
    if problem_type != REGRESSION:
        labels[0] = -100
    items = int(counted(LOGITS, labels, problem_type).sum())
    assert items == {SINGLE: 3, MULTI: 9, REGRESSION: 12}[problem_type]
    num_items = torch.tensor(items) if as_tensor else items
    parts = [slice(0, 1), slice(1, 4)]
    found = [loss(labels[part], problem_type, LOGITS[part], num_items=num_items) for part in parts]
    torch.testing.assert_close(sum(found), loss(labels, problem_type))
    shares = [share_of_items(counted(LOGITS[part], labels[part], problem_type), num_items) for part in parts]
    torch.testing.assert_close(sum(shares), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [(SINGLE, [1, 2]), (MULTI, [[1.0, 0, 0], [0, 1, 1]]), (REGRESSION, [[3.0, 0, 0], [0, 1, 2]])],
)
def test_outputs_that_a_samples_task_lacks_do_not_count(problem_type: str, labels: list) -> None:
    """Two tasks in one batch: the first has two outputs, the second has three."""
    given = torch.tensor(labels)
    logits = torch.tensor([[0.5, -1, -torch.inf], [1, 2, 3]], requires_grad=True)
    check_labels(given, problem_type, ("a", "b"), (2, 3), 2)
    found = label_loss(logits, given, problem_type)
    alone = [
        label_loss(logits[row : row + 1, :size], given[row : row + 1, :size] if given.ndim > 1 else given[[row]], kind)
        for row, size, kind in ((0, 2, problem_type), (1, 3, problem_type))
    ]
    weights = (1, 1) if problem_type == SINGLE else (2, 3)
    expected = sum(weight * part for weight, part in zip(weights, alone)) / sum(weights)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found, logits)[0].isfinite().all()


NUMBER = "'topics' has 1 output"


@pytest.mark.parametrize(
    ("problem_type", "outputs", "labels", "error", "message"),
    [
        (SINGLE, 3, torch.tensor([0, 1, 3, 0]), ValueError, r"holds 3 for sample 2.*'topics' has 3 classes"),
        (SINGLE, 3, torch.tensor([-1, 1, 2, 0]), ValueError, r"holds -1 for sample 0"),
        (SINGLE, 3, torch.tensor([0.0, 1, 2, 0]), TypeError, r"float32.*'topics' has 3 classes.*'regression'"),
        (SINGLE, 3, TARGETS, TypeError, r"\[4, 3\].*'multi_label_classification'"),
        (SINGLE, 3, TARGETS.long(), ValueError, r"\[4, 3\].*must be \[4\] or \[4, 1\]"),
        (SINGLE, 3, torch.tensor([0, 1]), ValueError, r"batch of 4"),
        (SINGLE, 3, torch.tensor(1), ValueError, r"shape \[\]"),
        (SINGLE, 3, [0, 1, 2, 0], TypeError, "list"),
        (MULTI, 3, torch.tensor([0, 1, 2, 0]), ValueError, r"shape \[4\].*'topics' has 3 classes.*\[4, 3\]"),
        (MULTI, 3, TARGETS[:, :2], ValueError, r"\[4, 2\].*must be \[4, 3\]"),
        (MULTI, 3, TARGETS * 2, ValueError, r"holds \[2.0, 2.0, 0.0\] for sample 0.*0 to 1"),
        (MULTI, 3, TARGETS * torch.nan, ValueError, r"0 to 1"),
        (REGRESSION, 1, torch.zeros(4, 2), ValueError, rf"{NUMBER};.*\[4\] or \[4, 1\]"),
        (REGRESSION, 1, torch.tensor([0, 1, torch.inf, 0]), ValueError, rf"inf for sample 2, but task {NUMBER};"),
        (REGRESSION, 2, torch.zeros(4), ValueError, r"must be \[4, 2\]"),
    ],
)
def test_labels_that_mean_nothing_are_refused(
    problem_type: str, outputs: int, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_labels(labels, problem_type, ("topics",), (outputs,), 4)


def test_a_label_is_held_against_its_own_samples_task() -> None:
    tasks, outputs = ("few", "many", "few"), (2, 3, 2)
    check_labels(torch.tensor([1, 2, 1]), SINGLE, tasks, outputs, 3)
    check_labels(torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, -100]]), MULTI, tasks, outputs, 3)
    with pytest.raises(ValueError, match="holds 2 for sample 2, but task 'few' has 2 classes"):
        check_labels(torch.tensor([1, 2, 2]), SINGLE, tasks, outputs, 3)
    with pytest.raises(ValueError, match=r"holds \[1, 0, 1\] for sample 0, but task 'few'"):
        check_labels(torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0]]), MULTI, tasks, outputs, 3)


def test_an_unknown_problem_type_is_refused() -> None:
    for problem_type in PROBLEM_TYPES:
        check_problem_type(problem_type)
    with pytest.raises(ValueError, match="'multi_label'; it must be one of 'single_label_classification'"):
        check_problem_type("multi_label")


def test_token_labels_are_checked() -> None:
    labels = torch.tensor([[4, -100, 9]])
    for dtype in (torch.int64, torch.int32):
        found = checked_tokens(labels.to(dtype), 10, (1, None))
        assert found.dtype == torch.int64 and torch.equal(found, labels)
    assert torch.equal(checked_tokens(labels.abs(), None, (1, None)), labels.abs())
    with pytest.raises(ValueError, match="holds -4, but this model has other tokens"):
        checked_tokens(-labels, None, (1, None))
    for given, error, message in (
        (labels.abs(), ValueError, "holds 100, but this model has 10 tokens"),
        (labels.float(), TypeError, "float32"),
        (labels > 0, TypeError, "bool"),
        (labels[0], ValueError, r"shape \[3\].*\[1, any\]"),
        (labels[:, :2], ValueError, r"shape \[1, 2\].*\[1, 3\]"),
        ([[4]], TypeError, "list"),
    ):
        with pytest.raises(error, match=message):
            checked_tokens(given, 10, (1, 3 if "1, 3" in message else None))


def test_a_mean_over_no_token_is_zero() -> None:
    counts = torch.tensor([[True, False], [True, True]])
    logits = torch.randn(3, 4, requires_grad=True)
    nothing = F.cross_entropy(logits, torch.full((3,), -100))
    assert nothing.isnan()
    found = token_loss(nothing, torch.zeros_like(counts), None)
    assert found == 0 and not torch.autograd.grad(found, logits)[0].any()
    mean = torch.tensor(2.0)
    assert token_loss(mean, counts, None) == 2 and token_loss(mean, counts, 6) == 1
    assert token_loss(torch.tensor(torch.nan), counts, None).isnan()  # another fault stays visible
