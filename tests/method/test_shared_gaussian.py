"""The shrunk covariance against its formula in NumPy and against scikit-learn, and where it has no value.

Scores and distances are tested with the rules (test_task_rules.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import OAS
from torch import Tensor

from qtuning_fast.method.shared_gaussian import oas


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 40), size=st.integers(2, 12), seed=st.integers(0, 2**16), scale=st.sampled_from([1e-6, 1, 1e6]))
def test_oas_is_the_formula(oas_by_numpy: Any, n: int, size: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = scale * torch.randn(n, size, generator=generator, dtype=torch.float64)
    rows -= rows.mean(0)
    scatter = rows.T @ rows
    covariance, rho = oas(scatter, n - 1)
    expected, expected_rho = oas_by_numpy(scatter.numpy(), n - 1)
    assert rho == pytest.approx(expected_rho, rel=1e-10)
    np.testing.assert_allclose(covariance, expected, rtol=0, atol=1e-12 * np.trace(expected))
    assert np.linalg.cond(covariance.numpy()) < 1e6


def test_oas_is_that_of_scikit_learn_but_for_what_it_leaves_out() -> None:
    """scikit-learn leaves out the terms with 2/F, and takes as many degrees of freedom as examples."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 300, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 3, 300)
    theirs = OAS(assume_centered=True).fit(rows.numpy())
    covariance, rho = oas(rows.T @ rows, 40)
    assert 0 < rho < 1 and rho == pytest.approx(theirs.shrinkage_, rel=2 / 300)
    np.testing.assert_allclose(covariance, theirs.covariance_, atol=0.01)


@pytest.mark.parametrize(
    ("scatter", "freedom"),
    [(torch.eye(3), 0), (torch.eye(3), -2), (torch.zeros(3, 3), 7), (torch.zeros(1, 1), 0)],
)
def test_where_nothing_is_known_of_the_spread_the_covariance_is_the_identity(scatter: Tensor, freedom: int) -> None:
    covariance, rho = oas(scatter.double(), freedom)
    assert torch.equal(covariance, torch.eye(len(scatter), dtype=torch.float64)) and rho == 1


@pytest.mark.parametrize("freedom", [1, 2, 50])
def test_one_feature_has_its_variance(freedom: int) -> None:
    covariance, rho = oas(torch.tensor([[6.0]], dtype=torch.float64), freedom)
    assert covariance.tolist() == [[pytest.approx(6 / freedom)]] and rho == 1
