"""The linear classifiers of the study, against scikit-learn and where a transfer must help."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from qtuning_fast.bench.learning.linear import accuracies, accuracy, pulled, transferred
from qtuning_fast.method.closed_form import LinearHead


def split(n: int, seed: int, *, classes: int = 2, size: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tasks with other seeds differ in their noise only: the classes lie along the same axes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    means = 1.2 * torch.eye(classes, size)
    return means[labels] + torch.randn(n, size, generator=generator), labels


def task(seed: int, shots: int = 4) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        "train": split(2 * shots, seed),
        "validation": split(32, seed + 100),
        "test": split(400, seed + 200),
    }


def nothing(classes: int, size: int) -> LinearHead:
    return LinearHead(torch.zeros(classes, size, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_pull_towards_nothing_is_a_regularised_logistic_regression(classes: int) -> None:
    x, y = split(40, 0, classes=classes)
    found = pulled((x, y), nothing(classes, 30), 0.5)
    ones = np.c_[x.numpy(), np.ones(len(x))]  # the bias is pulled, too
    # Of two classes scikit-learn fits the difference, whose squared norm is twice that of both halves.
    strength = 1 / 0.5 if classes > 2 else 2 / 0.5
    fitted = LogisticRegression(C=strength, fit_intercept=False, tol=1e-10, max_iter=2000).fit(ones, y.numpy())
    ours = torch.cat([found.weight, found.bias[:, None]], 1).numpy()
    theirs = fitted.coef_ - fitted.coef_.mean(0) if classes > 2 else fitted.coef_
    np.testing.assert_allclose(ours if classes > 2 else ours[1:] - ours[:1], theirs, atol=2e-4)


def test_a_strong_pull_leaves_the_head_where_it_is_and_a_weak_one_fits_the_examples() -> None:
    train = split(20, 1)
    towards = LinearHead(torch.randn(2, 30, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(pulled(train, towards, 1e8).weight, towards.weight, atol=1e-5, rtol=0)
    assert accuracy(pulled(train, towards, 1e-4), train) == 1.0


def test_a_related_task_helps_and_another_one_is_no_donor() -> None:
    names = ("no", "yes")
    tasks = [(names, task(1, shots=50)), (("a", "b"), task(2)), (names, task(3))]
    found = accuracies(tasks)
    assert [value is None for value in found["transferred"]] == [True, True, False]
    assert [value is None for value in found["donor"]] == [True, True, False]
    assert found["transferred"][2] > found["probe"][2] + 0.05  # type: ignore[operator]
    assert all(0.5 < value <= 1 for value in (*found["probe"], *found["closed_form"]))  # type: ignore[operator]


def test_a_donor_that_says_the_opposite_does_little_harm() -> None:
    splits = task(5, shots=50)
    probe = accuracies([(("no", "yes"), splits)])["probe"][0]
    wrong = LinearHead(torch.stack([torch.eye(30)[0], torch.eye(30)[1]]).double().flip(0), torch.zeros(2).double())
    assert accuracy(transferred([wrong], splits), splits["test"]) > probe - 0.05  # type: ignore[operator]
