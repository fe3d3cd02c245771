"""The bounded queue of task prompts, and DQ-PCA, which evicts rows from it.

Q-tuning (Guo et al., NAACL Findings 2024, arXiv 2404.14607) keeps the prompts of finished tasks in a queue and cuts a
full queue by a principal component analysis of its rows. A row here is a (key, value) pair over a layer's heads, with
the feature vector `[k ; v]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtuning_fast.method.settings import check_integer

EVICTIONS = ("pca", "fifo", "random", None)

_LEVEL = 1e-8  # a vector's sum, or a difference of magnitudes of its entries, below this counts as 0


def dq_pca(rows: Tensor, keep: int, *, center: bool = False) -> Tensor:
    """Project `rows` to the `keep` rows that hold the most energy: `Uᵀ rows`, with the leading left singular vectors U.

    Args:
        rows: `[n, F]`, floating point; the rows of one layer's queue.
        keep: number of rows to keep, at most `min(n, F)`.
        center: take the basis from the centred rows. Their left singular vectors are orthogonal to the vector of
            ones, so the projection loses the mean row; the default keeps it.

    Returns:
        `[keep, F]` in the dtype and on the device of `rows`, largest singular value first. The computation runs in
        float64 on the CPU and is deterministic: each singular vector has a non-negative sum or, if its sum vanishes, a
        positive largest entry.

    Raises:
        TypeError: `rows` is not a floating-point tensor.
        ValueError: `rows` is not two-dimensional or not finite, or `keep` is out of range.
    """
    return _decompose(rows, keep, center=center)[0]


def _decompose(rows: Tensor, keep: int, *, center: bool = False) -> tuple[Tensor, Tensor]:
    """Return the rows of `dq_pca` and the singular values `[min(n, F)]` in float64."""
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        raise TypeError(f"rows is {getattr(rows, 'dtype', type(rows).__name__)}; it must be a floating-point tensor")
    if rows.ndim != 2:
        raise ValueError(f"rows has shape {tuple(rows.shape)}; it must be [n, F]")
    if isinstance(keep, bool) or not isinstance(keep, int):
        raise TypeError(f"keep is {keep!r}; it must be an integer")
    if not 0 <= keep <= min(rows.shape):
        raise ValueError(f"keep is {keep}; it must be in 0..{min(rows.shape)}, the smaller side of rows")
    exact = rows.detach().to("cpu", torch.float64)
    if not exact.isfinite().all():
        raise ValueError("rows holds values that are not finite; all must be finite")
    if not exact.numel():  # nothing to decompose
        return rows.new_zeros(0, rows.shape[1]), exact.new_zeros(0)
    basis = exact - exact.mean(0) if center else exact
    left, singular_values, _ = torch.linalg.svd(basis, full_matrices=False)
    left = left[:, :keep] * _signs(left[:, :keep])
    kept = (left.T @ exact).to(rows.device, rows.dtype)
    if not kept.isfinite().all():
        raise ValueError(f"rows are too large: their projection overflows {rows.dtype}")
    return kept, singular_values


def _signs(vectors: Tensor) -> Tensor:
    """Return signs `[keep]` that make each column's sum, or else its first largest entry, positive."""
    sums, sizes = vectors.sum(0), vectors.abs()
    first_largest = (sizes >= sizes.amax(0) - _LEVEL).int().argmax(0, keepdim=True)
    return torch.where(sums.abs() < _LEVEL, vectors.gather(0, first_largest).squeeze(0), sums).sign()


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007)."""
    p = singular_values[singular_values > 0] / singular_values.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


@dataclass(frozen=True)
class Eviction:
    """Measurements of one eviction; each list has one entry a layer."""

    policy: str
    kept: int
    energy_kept: list[float]
    effective_rank: list[float]
    spectrum: list[list[float]]


class PromptQueue:
    """The queue `Q_old` of one model: for each layer the rows of finished prompts, newest first.

    It holds at most `(capacity - 1) * prompt_length` rows a layer, so that a prefix, with the prompt in training, never
    exceeds `capacity` prompts plus the shared one. Without eviction it holds every prompt.

    Args:
        capacity: number of prompts `C`, counting the one in training; 1 keeps no old rows.
        prompt_length: number of rows `l` of one prompt.
        eviction: `"pca"`, `"fifo"` (keeps the newest rows) or `"random"`; None keeps every prompt, whatever the
            capacity (Progressive Prompts, arXiv 2301.12314).

    Attributes:
        rows: one `[n, F]` float32 tensor a layer; empty before the first prompt.
        row_scale: one `[n]` tensor a layer: the initial weight of each row. It is 1, but after an eviction
            `min(1, mean row norm before / norm of this row)`, because projected rows differ widely in norm.
        evictions: number of evictions so far.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """

    def __init__(self, capacity: int, prompt_length: int, *, eviction: str | None = "pca") -> None:
        check_integer("capacity", capacity, 1)
        check_integer("prompt_length", prompt_length, 0)
        if eviction not in EVICTIONS:
            raise ValueError(f"eviction is {eviction!r}; it must be one of {', '.join(map(repr, EVICTIONS))}")
        self.capacity = capacity
        self.prompt_length = prompt_length
        self.eviction = eviction
        self.rows: list[Tensor] = []
        self.row_scale: list[Tensor] = []
        self.evictions = 0

    @property
    def max_rows(self) -> int:
        """The most rows that an eviction leaves."""
        return (self.capacity - 1) * self.prompt_length

    def __len__(self) -> int:
        """Return the number of rows in each layer."""
        return len(self.rows[0]) if self.rows else 0

    def push(self, prompt: Sequence[Tensor], weights: Sequence[Tensor], *, seed: int = 0) -> Eviction | None:
        """Add a finished prompt (Q-tuning, arXiv 2404.14607, the prompt queue).

        If everything fits, the prompt joins unchanged and older rows stay unweighted. Otherwise the weights are folded
        into the older rows, and all rows together are cut to `max_rows`.

        Args:
            prompt: `[l, F]` a layer.
            weights: `[n, F]` a layer: `W` of the rows held so far.
            seed: seed of the `"random"` policy.

        Returns:
            Measurements of the eviction, or None if nothing was evicted.
        """
        old = self.rows or [rows.new_zeros(0, rows.shape[1]) for rows in prompt]
        if self.eviction is None or len(prompt[0]) + len(old[0]) <= self.max_rows:
            self.rows = [torch.cat([new, held]) for new, held in zip(prompt, old)]
            self.row_scale = [rows.new_ones(len(rows)) for rows in self.rows]
            return None
        full = [torch.cat([new, weight * held]) for new, held, weight in zip(prompt, old, weights)]
        kept, spectra = zip(*(self._cut(rows, seed) for rows in full))
        self.rows = list(kept)
        self.row_scale = [_starting_scale(before, after) for before, after in zip(full, kept)]
        self.evictions += 1
        return Eviction(
            policy=self.eviction,
            kept=self.max_rows,
            energy_kept=[_energy_kept(before, after) for before, after in zip(full, kept)],
            effective_rank=[effective_rank(spectrum) for spectrum in spectra],
            spectrum=[spectrum.tolist() for spectrum in spectra],
        )

    def _cut(self, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return `max_rows` of `rows` by the policy, and the spectrum of `rows`."""
        keep = self.max_rows
        projected, spectrum = _decompose(rows, keep if self.eviction == "pca" else 0)
        if self.eviction == "pca":
            return projected, spectrum
        if self.eviction == "fifo":
            return rows[:keep].clone(), spectrum
        # All layers share the seed, so a row that is kept is kept in every layer.
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:keep].sort().values
        return rows[chosen.to(rows.device)], spectrum

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, for saving."""
        state = {f"rows.{layer}": rows for layer, rows in enumerate(self.rows)}
        state |= {f"row_scale.{layer}": scale for layer, scale in enumerate(self.row_scale)}
        return state | {"evictions": torch.tensor(self.evictions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        layers = sum(name.startswith("rows.") for name in state)
        self.rows = [state[f"rows.{layer}"] for layer in range(layers)]
        self.row_scale = [state[f"row_scale.{layer}"] for layer in range(layers)]
        self.evictions = int(state["evictions"])


def _starting_scale(before: Tensor, after: Tensor) -> Tensor:
    return (before.norm(dim=1).mean() / after.norm(dim=1)).nan_to_num(nan=1.0).clamp(max=1.0)


def _energy_kept(before: Tensor, after: Tensor) -> float:
    total = float(before.double().square().sum())
    return float(after.double().square().sum()) / total if total else 1.0
