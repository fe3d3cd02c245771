"""The linear probe: it learns what is linear, and the validation split chooses its strength."""

import numpy as np
import pytest

from qtuning_fast.lifelong.probe import C_VALUES, linear_probe


def draw(seed: int, count: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Two classes that the first of 20 features tells apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    features = rng.normal(0, noise, (count, 20))
    features[:, 0] += 2 * labels - 1
    return features, labels


def test_it_learns_what_is_linear():
    probe = linear_probe(draw(0, 40, 0.1), draw(1, 20, 0.1), draw(2, 50, 0.1))
    assert probe["accuracy"] == 1 and probe["C"] in C_VALUES


def test_labels_without_a_pattern_are_not_learned():
    features, labels = draw(0, 200, 1.0)
    unrelated = np.random.default_rng(3).normal(size=features.shape)
    probe = linear_probe(
        (unrelated[:100], labels[:100]), (unrelated[:50], labels[:50]), (unrelated[100:], labels[100:])
    )
    assert probe["accuracy"] == pytest.approx(0.5, abs=0.17)  # 3.4 standard deviations of 100 coins


def test_of_equals_the_strongest_regularisation_is_taken():
    split = draw(0, 40, 0.0)
    assert linear_probe(split, split, split)["C"] == C_VALUES[0]
