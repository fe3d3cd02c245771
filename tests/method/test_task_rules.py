"""Rules against their formulas in NumPy and against scikit-learn, and where formulas have no value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from qtuning_fast.method.shared_gaussian import SharedGaussian
from qtuning_fast.method.statistics import Recorder, TaskStatistics
from qtuning_fast.method.task_rule import Candidate, Evidence, TaskRule
from qtuning_fast.method.task_rules import RULES, ClosedForm, MostConfident, NearestMean, RanPAC, rule_by_name

Examples = tuple[Tensor, Tensor]


def asked_for_nothing() -> Any:
    pytest.fail("adapters were asked")


def evidence(features: Tensor) -> Evidence:
    return Evidence(features.double(), asked_for_nothing)


def examples(n: int, size: int, classes: int, seed: int = 0) -> Examples:
    """Each class has an example, if there are enough."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    means = torch.randn(classes, size, generator=generator)
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    return means[labels] + torch.randn(n, size, generator=generator) @ mixing, labels


def recorded(of: Examples, classes: int, rule: TaskRule | None = None, validation: Sequence[Examples] = ()) -> Any:
    recorder = Recorder(classes, {} if rule is None else {rule.feature_map: rule.map})
    recorder.add(*of)
    return recorder.finish(validation)


def candidates(*statistics: TaskStatistics) -> list[Candidate]:
    return [Candidate(f"task-{number}", each.classes, each) for number, each in enumerate(statistics)]


def two_tasks(n: int = 60, size: int = 5, seed: int = 0) -> tuple[list[Examples], np.ndarray, np.ndarray]:
    """Tasks of three and two classes; all features, and the labels among five classes."""
    tasks = [examples(n, size, 3, seed), examples(n, size, 2, seed + 1)]
    x = torch.cat([task[0] for task in tasks]).double().numpy()
    return tasks, x, torch.cat([tasks[0][1], tasks[1][1] + 3]).numpy()


# The shrunk covariance


# Linear discriminant analysis


def test_scores_and_distances_are_those_of_the_formula(oas_by_numpy: Any) -> None:
    tasks, x, y = two_tasks()
    gaussian = SharedGaussian.of([recorded(tasks[0], 3), recorded(tasks[1], 2)])
    means = np.stack([x[y == c].mean(0) for c in range(5)])
    centred = x - means[y]
    sigma, rho = oas_by_numpy(centred.T @ centred, len(x) - 5)
    inverse = np.linalg.inv(sigma)
    new = torch.randn(9, 5, generator=torch.Generator().manual_seed(9))
    phi = new.double().numpy()
    expected = phi @ inverse @ means.T - 0.5 * np.diag(means @ inverse @ means.T)
    assert gaussian.shrinkage == pytest.approx(rho, rel=1e-10)
    np.testing.assert_allclose(gaussian(evidence(new)), expected, rtol=0, atol=1e-9)
    apart = phi[:, None] - means
    distances = np.einsum("bcf,fg,bcg->bc", apart, inverse, apart).min(1)
    np.testing.assert_allclose(gaussian.distances(evidence(new)), distances, rtol=1e-9)
    np.testing.assert_allclose(gaussian.whitening.T @ gaussian.whitening, inverse, atol=1e-9)


def test_probabilities_are_those_of_scikit_learns_discriminant_analysis() -> None:
    tasks, x, y = two_tasks()
    gaussian = SharedGaussian.of([recorded(tasks[0], 3), recorded(tasks[1], 2)])
    covariance = torch.linalg.inv(gaussian.whitening.T @ gaussian.whitening).numpy()

    class Known:
        """Stands for an estimator of the covariance."""

        def fit(self, _: Any) -> Known:
            self.covariance_ = covariance
            return self

        def get_params(self, deep: bool = True) -> dict[str, Any]:
            return {}

    theirs = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Known(), priors=[0.2] * 5).fit(x, y)
    new = torch.randn(9, 5, generator=torch.Generator().manual_seed(9))
    found = gaussian(evidence(new)).softmax(1)
    np.testing.assert_allclose(found, theirs.predict_proba(new.double().numpy()), atol=1e-8)


def test_the_closed_form_is_that_gaussian() -> None:
    tasks, x, _ = two_tasks()
    known = [recorded(tasks[0], 3), recorded(tasks[1], 2)]
    scores = ClosedForm().fit(candidates(*known))
    assert torch.equal(scores(evidence(torch.tensor(x))), SharedGaussian.of(known)(evidence(torch.tensor(x))))


# Where formulas have no value

_DRAW = torch.Generator().manual_seed(4)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_DRAW)


HARD: dict[str, tuple[Tensor, Tensor, int]] = {
    "one example": (torch.tensor([[1.0, 2.0]]), torch.tensor([0]), 1),
    "one example a class": (torch.eye(4), torch.arange(4), 4),
    "classes without an example": (normal(6, 3), torch.ones(6), 4),
    "all features equal": (torch.ones(6, 3), torch.arange(6) % 2, 2),
    "all features zero": (torch.zeros(6, 3), torch.arange(6) % 2, 2),
    "equal up to rounding": (torch.ones(6, 3) + 6e-8 * normal(6, 3), torch.arange(6) % 2, 2),
    "a feature that never varies": (normal(9, 3) * torch.tensor([1, 1, 0]) + 1, torch.arange(9) % 2, 2),
    "the same feature twice": (normal(9, 2)[:, [0, 1, 1]], torch.arange(9) % 2, 2),
    "more classes than features": (normal(30, 2), torch.arange(30) % 15, 15),
    "one feature": (normal(9, 1), torch.arange(9) % 3, 3),
    "fewer examples than features": (normal(5, 40), torch.arange(5) % 2, 2),
    "huge": (1e6 * normal(20, 4), torch.arange(20) % 3, 3),
    "tiny": (1e-6 * normal(20, 4), torch.arange(20) % 3, 3),
    "both": (normal(20, 4) * torch.tensor([1e6, 1e-6, 1, 1]), torch.arange(20) % 3, 3),
}


@pytest.mark.parametrize("name", ["closed-form", "nearest-mean", "ranpac", "trained-head"])
@pytest.mark.parametrize("case", HARD)
def test_scores_are_numbers_wherever_there_is_an_answer(name: str, case: str) -> None:
    rule = RanPAC(size=20) if name == "ranpac" else rule_by_name(name)
    features, labels, classes = HARD[case]
    known = recorded((features, labels.long()), classes, rule, [(features[:3], labels[:3].long())])
    for tasks in ([known], [known, known]):
        scores = rule.fit(candidates(*tasks))(evidence(features))
        seen = torch.cat([each.features.seen for each in tasks])
        assert scores[:, seen].isfinite().all() and scores[:, ~seen].isneginf().all()
        assert scores.softmax(1).sum(1).sub(1).abs().max() < 1e-12
    distances = SharedGaussian.of([known]).distances(evidence(features))
    assert distances.isfinite().all() and (distances >= 0).all()


@pytest.mark.parametrize("case", ["all features equal", "equal up to rounding", "one example a class"])
def test_differences_of_rounding_are_no_spread(case: str) -> None:
    features, labels, classes = HARD[case]
    gaussian = SharedGaussian.of([recorded((features, labels.long()), classes)])
    assert torch.equal(gaussian.whitening, torch.eye(features.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("case", ["one example a class", "huge", "tiny", "both", "the same feature twice"])
def test_an_example_apart_from_all_others_is_recognised(case: str) -> None:
    features, _, _ = HARD[case]
    alone = recorded((features[:1], torch.zeros(1).long()), 1)
    others = recorded((features[1:] + 20 * features[1:].abs().max(), torch.zeros(len(features) - 1).long()), 1)
    scores = ClosedForm().fit(candidates(others, alone))
    assert scores(evidence(features[:1])).argmax(1).tolist() == [1]


# The other rules


def test_the_nearest_mean_is_that_of_scikit_learn() -> None:
    tasks, x, y = two_tasks()
    scores = NearestMean().fit(candidates(recorded(tasks[0], 3), recorded(tasks[1], 2)))
    new = torch.randn(50, 5, generator=torch.Generator().manual_seed(9))
    found = scores(evidence(new))
    assert found.argmax(1).tolist() == NearestCentroid().fit(x, y).predict(new.double().numpy()).tolist()
    means = np.stack([x[y == c].mean(0) for c in range(5)])
    variance = ((x - means[y]) ** 2).sum() / (len(x) - 5) / 5
    squares = ((new.double().numpy()[:, None] - means) ** 2).sum(2)
    expected = -0.5 * (squares - squares[:, :1]) / variance  # up to what is the same for all classes
    np.testing.assert_allclose(found - found[:, :1], expected, atol=1e-9)


def test_ranpac_is_ridge_regression_on_random_features() -> None:
    rule = RanPAC(size=12, seed=3)
    tasks, x, y = two_tasks()
    validation = [examples(20, 5, 3, 7), examples(20, 5, 2, 8)]
    known = [recorded(task, n, rule, [held]) for task, n, held in zip(tasks, (3, 2), validation)]
    scores = rule.fit(candidates(*known))
    W = torch.randn(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    H, held = np.maximum(x @ W, 0), torch.cat([each[0] for each in validation]).double().numpy()
    targets = np.eye(5)[torch.cat([validation[0][1], validation[1][1] + 3])]
    new = torch.randn(9, 5, generator=torch.Generator().manual_seed(9))
    tried = []
    for power in range(-8, 4):
        ridge = Ridge(alpha=np.trace(H.T @ H) / 12 * 10.0**power, fit_intercept=False, solver="cholesky")
        ridge.fit(H, np.eye(5)[y])
        loss = ((ridge.predict(np.maximum(held @ W, 0)) - targets) ** 2).sum()
        tried.append((loss, ridge.predict(np.maximum(new.double().numpy() @ W, 0))))
    best = min(tried, key=lambda each: each[0])[1]
    np.testing.assert_allclose(scores(evidence(new)), best, atol=1e-8)
    assert torch.equal(rule.map(new.double()), RanPAC(12, 3).map(new.double()))  # the same in another process


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "many"])
def test_ranpac_needs_a_number_of_features(size: Any) -> None:
    with pytest.raises(ValueError, match=r"size is .* it must be a positive integer"):
        RanPAC(size)


def test_the_most_confident_adapter_is_chosen() -> None:
    asked = {"task-0": torch.tensor([[0.6, 0.4], [0.7, 0.3]]), "task-1": torch.tensor([[0.5, 0.3, 0.2], [0.1, 0, 0.9]])}
    known = [Candidate("task-0", 2, None), Candidate("task-1", 3, None)]
    scores = MostConfident().fit(known)(Evidence(torch.zeros(2, 1), lambda: asked))
    expected = torch.tensor([[0.6 / 1.1, 0, 0.5 / 1.1, 0, 0], [0.7 / 1.6, 0, 0, 0, 0.9 / 1.6]])
    torch.testing.assert_close(scores.softmax(1).float(), expected)
    assert not MostConfident.needs_statistics


# Names of rules, validation examples, devices


def test_rules_have_names() -> None:
    assert {name: rule_by_name(name).name for name in RULES} == {name: name for name in RULES}
    mine = NearestMean()
    assert rule_by_name(mine) is mine
    with pytest.raises(
        ValueError, match=r"'nearest'; it must be one of closed-form, nearest-mean, ranpac, trained-head"
    ):
        rule_by_name("nearest")
    for wrong in (None, ClosedForm):
        with pytest.raises(TypeError, match="must be a TaskRule or one of"):
            rule_by_name(wrong)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError):
        TaskRule().fit([])
