"""Definitions that several tests of the method compare with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

OAS = Callable[[np.ndarray, int], tuple[np.ndarray, float]]


def _oas(scatter: np.ndarray, m: int) -> tuple[np.ndarray, float]:
    """The formula of the specification."""
    F = len(scatter)
    S = scatter / m
    trace, squares = np.trace(S), np.trace(S @ S)
    rho = ((1 - 2 / F) * squares + trace**2) / ((m + 1 - 2 / F) * (squares - trace**2 / F))
    rho = min(1.0, rho)
    return (1 - rho) * S + rho * trace / F * np.eye(F), rho


@pytest.fixture(scope="session")
def oas_by_numpy() -> OAS:
    """The shrunk covariance and ρ of a scatter with m degrees of freedom."""
    return _oas
