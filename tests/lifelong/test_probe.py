"""The linear probe: it learns what is linear, and the validation split chooses its strength."""

import numpy as np
import pytest
from scipy.special import softmax

from qtuning_fast.lifelong.probe import C_VALUES, tuned_probe
from qtuning_fast.lifelong.scores import score
from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE


def draw(seed: int, count: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Two classes that the first of 20 features tells apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    features = rng.normal(0, noise, (count, 20))
    features[:, 0] += 2 * labels - 1
    return features, labels


def test_it_learns_what_is_linear():
    probe = tuned_probe(draw(0, 40, 0.1), draw(1, 20, 0.1), SINGLE, 2)
    features, labels = draw(2, 50, 0.1)
    assert score(SINGLE, probe(features), labels) == 1 and probe.C in C_VALUES


@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_a_map_whose_probabilities_are_the_regressions(classes):
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), np.arange(60) % classes
    features[np.arange(60), labels] += 2
    probe = tuned_probe((features[:40], labels[:40]), (features[40:], labels[40:]), SINGLE, classes)
    fitted = LogisticRegression(C=probe.C, max_iter=300).fit(features[:40], labels[:40])
    np.testing.assert_allclose(softmax(probe(features[40:]), axis=1), fitted.predict_proba(features[40:]), atol=1e-12)


@pytest.mark.parametrize("given", [[1, 3], [2]])
def test_classes_without_an_example_are_never_the_answer(given):
    features, _ = draw(0, 40, 0.1)
    labels = np.resize(given, 40)
    features[:, 0] = labels
    probe = tuned_probe((features, labels), (features, labels), SINGLE, 4)
    assert probe(features).shape == (40, 4) and (probe(features).argmax(1) == labels).all()


def test_labels_without_a_pattern_are_not_learned():
    features, labels = draw(0, 200, 1.0)
    unrelated = np.random.default_rng(3).normal(size=features.shape)
    probe = tuned_probe((unrelated[:100], labels[:100]), (unrelated[:50], labels[:50]), SINGLE, 2)
    found = score(SINGLE, probe(unrelated[100:]), labels[100:])
    assert found == pytest.approx(0.5, abs=0.17)  # 3.4 standard deviations of 100 coins


def test_of_equals_the_strongest_regularisation_is_taken():
    split = draw(0, 40, 0.0)
    assert tuned_probe(split, split, SINGLE, 2).C == C_VALUES[0]


def test_labels_are_told_apart_one_by_one():
    (features, first), (_, second) = draw(0, 60, 0.1), draw(1, 60, 0.1)
    features[:, 1] = 2 * second[::-1] - 1
    always = np.ones(60, dtype=int)
    labels = np.stack([first, second[::-1], always, 0 * always], axis=1)
    parts = [(features[part], labels[part]) for part in (slice(20), slice(20, 40), slice(40, 60))]
    train, validation, (features, labels) = parts
    assert score(MULTI, tuned_probe(train, validation, MULTI, 4)(features), labels) == 1


def test_numbers_are_regressed():
    features, _ = draw(0, 90, 0.1)
    numbers = 3 * features[:, 0] + 10
    parts = [(features[part], numbers[part]) for part in (slice(30), slice(30, 60), slice(60, 90))]
    train, validation, (features, numbers) = parts
    assert score(REGRESSION, tuned_probe(train, validation, REGRESSION, 1)(features), numbers) > 0.99
