"""Metrics of runs that never happened, in the shape of a real run's metrics.json."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qtuning_fast.lifelong.metrics import evaluation_summary

NAMES = ["trec", "agnews", "sst2", "clinc-banking", "dbpedia", "yelp-review-full", "emotion"]
LAYERS, HEADS, ROWS, CAPACITY, SHARED = 6, 4, 10, 4, 10


def make_metrics(tasks: int, seed: int = 0, gate: bool = True, capacity: int = CAPACITY) -> dict[str, Any]:
    """A plausible run: learning curves that bend, a queue that fills and overflows, old tasks that fade."""
    rng = np.random.default_rng(seed)
    names = [NAMES[i] if tasks <= len(NAMES) else f"{NAMES[i % len(NAMES)]}-{i:02d}" for i in range(tasks)]
    learned = rng.uniform(0.6, 0.95, tasks)
    age = np.subtract.outer(np.arange(tasks), np.arange(tasks))
    fading = learned * (0.35 + 0.65 * 0.75 ** age.clip(min=0)) + rng.normal(0, 0.01, (tasks, tasks))
    probe = (learned - rng.uniform(-0.05, 0.2, tasks)).tolist()
    return {
        "tasks": names,
        "per_task": [make_task(name, i, rng, gate, capacity) for i, name in enumerate(names)],
        "task_adapter": evaluation_summary(_below(np.tile(learned, (tasks, 1)))),
        "live_queue": evaluation_summary(_below(np.where(age == 0, learned, fading).clip(0, 1))),
        "baselines": {"linear_probe": {"accuracy": probe, "average_accuracy": float(np.mean(probe))}},
        "config": {
            "method": {"prompt_length": ROWS, "queue_size": capacity, "gate": "tanh" if gate else None, "layers": None},
            "training": {"steps": 200, "learning_rate": 0.03, "few_shot": {"per_class": 16}},
            "stream": f"offline-{tasks}",
            "base_model": "bert-tiny",
        },
        "versions": {"qtuning_fast": "0.1.0", "torch": "2.13.0"},
        "device": "cpu",
        "seed": seed,
    }


def make_task(name: str, i: int, rng: np.random.Generator, gate: bool, capacity: int) -> dict[str, Any]:
    steps = int(rng.integers(120, 240))
    at = np.arange(10, steps, 10)
    old = min(i, capacity - 1) * ROWS
    evicts = i >= capacity
    spectrum = [np.sort(rng.lognormal(1 - np.arange(old + ROWS) / 8, 0.2))[::-1] for _ in range(LAYERS)]
    energy = [float((s[:old] ** 2).sum() / (s**2).sum()) for s in spectrum]
    rank = [float(s.sum() ** 2 / (s**2).sum()) for s in spectrum]
    return {
        "name": name,
        "label_names": [f"label {k}" for k in range(2 + i % 5)],
        "num_train": 320,
        "num_validation": 64,
        "num_test": 500,
        "seconds": 12.5 + rng.random(),
        "steps": steps,
        "step_seconds": 0.05 + 0.01 * min(i, capacity) / capacity + 0.002 * rng.random(),
        "prefix_rows": SHARED + ROWS + old,
        "energy_kept": float(np.mean(energy)) if evicts else None,
        "effective_rank": float(np.mean(rank)) if evicts else None,
        "best_step": int(at[2 * len(at) // 3]),
        "eviction": {
            "policy": "pca",
            "kept": old,
            "energy_kept": energy,
            "effective_rank": rank,
            "spectrum": [s.tolist() for s in spectrum],
        }
        if evicts
        else None,
        "loss_curve": [[int(s), float(1.6 * np.exp(-s / 60) + 0.1 + 0.05 * rng.random())] for s in at],
        "retention_curve": [[int(s), float(-1.2 * (1 - np.exp(-s / 50)))] for s in at] if evicts else [],
        "validation_curve": [[int(s), float(0.85 - 0.5 * np.exp(-s / 50))] for s in at],
        "gate": {
            "alpha": (1 + 0.05 * i**0.5 * rng.normal(0.5, 0.5, (LAYERS, HEADS))).tolist(),
            "tau": (1 - 0.04 * i**0.5 * rng.normal(0.5, 0.5, (LAYERS, HEADS))).tolist(),
        }
        if gate
        else None,
        "row_weights": rng.lognormal(0, 0.3, (LAYERS, old)).tolist(),
    }


def _below(matrix: np.ndarray) -> list[list[float | None]]:
    return [[value if j <= i else None for j, value in enumerate(row)] for i, row in enumerate(matrix.tolist())]


@pytest.fixture(name="make_metrics")
def make_metrics_fixture() -> Callable[..., dict[str, Any]]:
    return make_metrics
