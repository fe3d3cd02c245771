import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtuning_fast import PromptQueue, dq_pca
from qtuning_fast.method.queue import effective_rank


def random_rows(n: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 2**16))
def test_dq_pca_is_the_best_projection(n: int, features: int, keep: int, seed: int) -> None:
    keep = min(keep, n, features)
    rows = random_rows(n, features, seed)
    kept = dq_pca(rows, keep)
    # Independently: the eigenvectors of rows rowsᵀ. Largest first, orthogonal rows, energies the eigenvalues.
    energies = np.linalg.eigvalsh((rows @ rows.T).numpy())[::-1][:keep]
    assert kept.shape == (keep, features)
    np.testing.assert_allclose((kept @ kept.T).numpy(), np.diag(energies), atol=1e-10 * max(1, energies.max(initial=0)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**16))
def test_dq_pca_signs(n: int, features: int, seed: int) -> None:
    rows = random_rows(n, features, seed)
    keep = min(n, features)
    kept = dq_pca(rows, keep)
    # kept = Uᵀ rows, so U = rows keptᵀ / energy.
    U = rows @ kept.T / kept.square().sum(1)
    assert (U.sum(0) > -1e-6).all()


def test_dq_pca_sign_of_vectors_that_sum_to_zero() -> None:
    rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0]], dtype=torch.float64)  # u = ±(1, -1)/√2
    assert dq_pca(rows, 1).tolist() == [[pytest.approx(3 * 2**0.5), pytest.approx(0)]]
    assert dq_pca(-rows, 1).tolist() == [[pytest.approx(-3 * 2**0.5), pytest.approx(0)]]


def test_dq_pca_signs_of_entries_that_are_equally_large() -> None:
    # u = ±(1, 0, -1)/√2: its sum vanishes, and of its largest entries the first decides, not the last bit.
    rows = torch.tensor([[-2.0, 0.0], [0.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    for noise in (0, 1e-16, -1e-16):
        nudged = rows + noise * torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
        assert dq_pca(nudged, 1)[0, 0].item() == pytest.approx(-2 * 2**0.5)


def test_dq_pca_of_nothing_and_of_too_much() -> None:
    assert dq_pca(torch.zeros(0, 4), 0).shape == (0, 4)
    assert dq_pca(torch.zeros(3, 4), 0).shape == (0, 4)
    with pytest.raises(ValueError, match="rows"):
        dq_pca(torch.full((4, 4), 6e4, dtype=torch.float16), 1)


def test_dq_pca_centred_loses_the_mean_row() -> None:
    rows = random_rows(6, 10) + 5
    assert dq_pca(rows, 6, center=True)[:5].mean(1).abs().max() < 0.5 * rows.mean()
    assert dq_pca(rows, 1)[0].mean().abs() > 5  # the mean row is what the uncentred basis keeps first


def test_dq_pca_keeps_dtype_and_repeats_itself() -> None:
    rows = random_rows(12, 20).float()
    assert dq_pca(rows, 5).dtype == torch.float32
    assert torch.equal(dq_pca(rows, 5), dq_pca(rows, 5))


@pytest.mark.parametrize(
    ("rows", "keep", "error", "named"),
    [
        (torch.ones(3, 4), 4, ValueError, "keep"),
        (torch.ones(4, 3), 4, ValueError, "keep"),
        (torch.ones(4, 3), -1, ValueError, "keep"),
        (torch.ones(4, 3), 1.0, TypeError, "keep"),
        (torch.ones(4, 3), True, TypeError, "keep"),
        (torch.ones(4), 1, ValueError, "rows"),
        (torch.ones(4, 3, dtype=torch.int64), 1, TypeError, "rows"),
        ([[1.0]], 1, TypeError, "rows"),
        (torch.full((4, 3), float("nan")), 1, ValueError, "rows"),
    ],
)
def test_dq_pca_refuses(rows: object, keep: object, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        dq_pca(rows, keep)  # type: ignore[arg-type]


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0


def weights_like(queue: PromptQueue, value: float = 1.0) -> list[Tensor]:
    return [torch.full_like(rows, value) for rows in queue.rows] or [torch.ones(0, 12)] * 2


def prompts(seed: int, length: int = 3) -> list[Tensor]:
    return [random_rows(length, 12, seed * 2 + layer).float() for layer in range(2)]


def test_queue_fills_then_evicts() -> None:
    queue = PromptQueue(3, 3)
    first, second, third = prompts(1), prompts(2), prompts(3)
    assert queue.push(first, weights_like(queue)) is None
    assert queue.push(second, weights_like(queue, 7.0)) is None  # unweighted while everything fits
    assert torch.equal(queue.rows[0], torch.cat([second[0], first[0]]))
    assert torch.equal(queue.row_scale[0], torch.ones(6))
    before = torch.cat([third[1], 0.5 * queue.rows[1]])
    eviction = queue.push(third, weights_like(queue, 0.5))
    assert eviction is not None and eviction.policy == "pca" and eviction.kept == 6 == len(queue)
    torch.testing.assert_close(queue.rows[1], dq_pca(before, 6))
    norms = before.norm(dim=1).mean() / queue.rows[1].norm(dim=1)
    torch.testing.assert_close(queue.row_scale[1], norms.clamp(max=1))
    assert (queue.row_scale[1] < 1).any()
    spectrum = torch.linalg.svdvals(before.double())
    assert eviction.energy_kept[1] == pytest.approx(float(spectrum[:6].square().sum() / spectrum.square().sum()), 1e-5)
    assert eviction.effective_rank[1] == pytest.approx(effective_rank(spectrum))
    assert queue.evictions == 1


def test_fifo_keeps_the_newest() -> None:
    queue = PromptQueue(3, 3, eviction="fifo")
    for seed in (1, 2, 3):
        queue.push(prompts(seed), weights_like(queue))
    assert torch.equal(queue.rows[0], torch.cat([prompts(3)[0], prompts(2)[0]]))


def test_random_keeps_the_same_rows_in_all_layers_and_depends_on_the_seed() -> None:
    def kept(seed: int) -> list[list[int]]:
        queue = PromptQueue(4, 3, eviction="random")
        for task in range(4):
            numbers = [torch.full((3, 12), 1.0) * torch.arange(3 * task, 3 * task + 3)[:, None] for _ in range(2)]
            queue.push(numbers, weights_like(queue), seed=seed)
        return [rows[:, 0].int().tolist() for rows in queue.rows]

    assert kept(0)[0] == kept(0)[1] == kept(0)[0]
    assert any(kept(0) != kept(seed) for seed in range(1, 5))
    assert len(set(kept(0)[0])) == 9


def test_capacity_one_keeps_nothing() -> None:
    queue = PromptQueue(1, 3)
    eviction = queue.push(prompts(1), weights_like(queue))
    assert eviction is not None and eviction.energy_kept == [0, 0]
    assert len(queue) == 0


def test_without_eviction_everything_stays() -> None:
    queue = PromptQueue(2, 3, eviction=None)
    for seed in range(1, 5):
        assert queue.push(prompts(seed), weights_like(queue, 0.5)) is None
    assert torch.equal(queue.rows[0], torch.cat([prompts(seed)[0] for seed in (4, 3, 2, 1)]))
    assert torch.equal(queue.row_scale[0], torch.ones(12)) and queue.evictions == 0


def test_a_cut_never_exceeds_its_bound_over_many_tasks() -> None:
    queue = PromptQueue(4, 3)
    sizes = []
    for task in range(40):
        queue.push(prompts(task), weights_like(queue))
        sizes.append(len(queue))
    assert sizes[:3] == [3, 6, 9] and set(sizes[3:]) == {9}
    assert all(rows.isfinite().all() for rows in queue.rows)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ((0, 3), ValueError, "capacity"),
        ((1.0, 3), TypeError, "capacity"),
        ((2, -1), ValueError, "prompt_length"),
        ((2, True), TypeError, "prompt_length"),
    ],
)
def test_queue_refuses(arguments: tuple, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        PromptQueue(*arguments)
    with pytest.raises(ValueError, match=r"eviction.*lru"):
        PromptQueue(2, 3, eviction="lru")


def test_state_goes_there_and_back() -> None:
    queue = PromptQueue(2, 3)
    for task in range(3):
        queue.push(prompts(task), weights_like(queue))
    other = PromptQueue(2, 3)
    other.load_state_dict(queue.state_dict())
    assert other.evictions == 2
    assert all(torch.equal(a, b) for a, b in zip(queue.rows + queue.row_scale, other.rows + other.row_scale))
