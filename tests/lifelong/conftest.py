"""Metrics of runs that never happened, and tiny models with toy tasks for every type of task."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from qtuning_fast import QTuningConfig
from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.metrics import evaluation_summary
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.lifelong.runs import RunSettings, run_stream

NAMES = ["trec", "agnews", "sst2", "clinc-banking", "dbpedia", "yelp-review-full", "emotion"]
LAYERS, HEADS, ROWS, CAPACITY, SHARED = 6, 4, 10, 4, 10


def make_metrics(
    tasks: int, seed: int = 0, gate: bool = True, capacity: int = CAPACITY, class_incremental: bool = True
) -> dict[str, Any]:
    """A plausible run: learning curves that bend, a queue that fills and overflows, old tasks that fade.

    Without `class_incremental` it is one of a version that did not answer without the task's name.
    """
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
        **({"class_incremental": make_class_incremental(learned, seed)} if class_incremental else {}),
    }


def make_class_incremental(learned: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """What a run measures without the task's name: tasks are found less often the more there are."""
    rng, tasks = np.random.default_rng(1000 + seed), len(learned)
    among = np.arange(tasks)[:, None]
    found = np.clip(rng.uniform(0.85, 1, tasks) - 0.02 * rng.uniform(0, 1, tasks) * among, 0.3, 1)
    found[0] = 1
    weights = rng.gamma(0.2, 1.0, (tasks, tasks)) * (1 - np.eye(tasks)) + 1e-9 * (1 - np.eye(tasks))
    wrong = weights / weights.sum(axis=1, keepdims=True) if tasks > 1 else weights
    right = found[-1]
    confidences = (np.arange(10) + 0.6) / 10
    first = min(int(10 / tasks), 9)  # the likeliest of T tasks has at least 1/T
    counts = np.geomspace(12, 500 * tasks, 10).astype(int)
    bins = [
        [float(c), float(np.clip(c - 0.04 + 0.06 * rng.random(), 0, 1)), int(n)] for c, n in zip(confidences, counts)
    ]
    alone = tasks == 1
    auroc, detected = rng.uniform(0.75, 1, tasks).tolist(), rng.uniform(0.2, 0.95, tasks).tolist()
    return {
        "rule": "closed-form",
        "classes": [2 + i % 5 for i in range(tasks)],
        "adapters": make_unnamed(learned * found, found),
        "closed_form": make_unnamed((learned - 0.05) * found, found),
        "baselines": {
            "nearest_class_mean": make_unnamed((learned - 0.15) * (found - 0.1), found - 0.1),
            "joint_regression": {
                "accuracy": (learned * right).tolist(),
                "average_accuracy": float((learned * right).mean()),
                "task_found": float(right.mean()) - 0.01,
            },
        },
        "confusion": (np.diag(right) + (1 - right)[:, None] * wrong).tolist(),
        "calibration": {"error": 0.021, "temperature": 1.7, "bins": bins[first:]},
        "unknown": {
            "false_alarm_rate": 0.01,
            "false_alarms": 0.013,
            "threshold": 412.5,
            "auroc": None if alone else auroc,
            "mean_auroc": None if alone else float(np.mean(auroc)),
            "detected": None if alone else detected,
            "mean_detected": None if alone else float(np.mean(detected)),
        },
    }


def make_unnamed(accuracy: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """One evaluation without the task's name, from `[T, T]` matrices."""
    matrix, tasks = _below(accuracy), len(accuracy)
    rows = [np.mean(row[: i + 1]) for i, row in enumerate(accuracy)]
    lost = np.nanmax(np.where(np.tri(tasks, dtype=bool), accuracy, np.nan), axis=0) - accuracy[-1]
    return {
        "accuracy_matrix": matrix,
        "average_accuracy": float(rows[-1]),
        "cumulative_average_accuracy": float(np.mean(rows)),
        "forgetting": float(lost[:-1].mean()) if tasks > 1 else 0.0,
        "task_found": float(found[-1].mean()),
        "task_found_matrix": _below(found),
        "label_accuracy": float(rows[-1]) + 0.012,
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
        "start": make_start(i, rng),
        "start_seconds": 1.5,
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


def make_start(i: int, rng: np.random.Generator) -> dict[str, Any]:
    """The first task has no choice, the others from four starts."""
    rows = [("random", None), ("queue-mean", None), ("prompt", "task before"), ("prompt", "task before")]
    considered: list[dict[str, Any]] = [
        {"rows": kind, "donor": donor, "head": "closed-form", "mixed_with": [], "loss": 0.4 + 0.3 * rng.random()}
        for kind, donor in rows[: 4 if i else 1]
    ]
    if i:
        considered[3]["mixed_with"] = ["task before"]
    return {"chosen": dict(considered[i % len(considered)]), "considered": considered}


def _below(matrix: np.ndarray) -> list[list[float | None]]:
    return [[value if j <= i else None for j, value in enumerate(row)] for i, row in enumerate(matrix.tolist())]


@pytest.fixture(name="make_metrics")
def make_metrics_fixture() -> Callable[..., dict[str, Any]]:
    return make_metrics


# Tiny models that write, or see

WORDS = ["red", "green", "blue", "cat", "dog", "the", "a", "is", "was", "old", "new", "very"]
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]


def make_tokenizer(*, decoder: bool, ends: bool = True) -> PreTrainedTokenizerFast:
    """Whole words. For decoders it begins with <s> and has no padding; with `ends` there is a token that ends."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "<s> $A" if decoder else "$A </s>" if ends else "$A"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 3), ("</s>", 1)])
    special = {"unk_token": "<unk>"} | ({"eos_token": "</s>"} if ends else {})
    special |= {"bos_token": "<s>"} if decoder else {"pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(name="make_tokenizer", scope="session")
def make_tokenizer_fixture() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def folders_of_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny T5, Llama and ViT by their type of task, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("models")
    ids = {"vocab_size": len(SPECIAL) + len(WORDS), "eos_token_id": 1}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    t5 = {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 48}
    torch.manual_seed(1)
    writers = {
        "text-to-text": T5ForConditionalGeneration(T5Config(**t5, **ids, pad_token_id=0, decoder_start_token_id=0)),
        "causal-lm": LlamaForCausalLM(
            LlamaConfig(
                **sizes,
                **ids,
                bos_token_id=3,
                pad_token_id=None,
                max_position_embeddings=32,
                initializer_range=0.3,
                tie_word_embeddings=True,
            )
        ),
        "image-classification": ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8, initializer_range=0.2)),
    }
    with torch.no_grad():
        for parameter in writers["text-to-text"].parameters():
            if parameter.ndim > 1:  # weights large enough for prompts to make a difference
                parameter.add_(torch.randn_like(parameter) * 0.2)
    for task_type, model in writers.items():
        model.save_pretrained(folder / task_type)
    make_tokenizer(decoder=False).save_pretrained(folder / "text-to-text")
    make_tokenizer(decoder=True).save_pretrained(folder / "causal-lm")
    size = {"height": 16, "width": 16}
    ViTImageProcessorPil(size=size).save_pretrained(folder / "image-classification")
    return {task_type: folder / task_type for task_type in writers}


@pytest.fixture(scope="session")
def toy_texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tasks as CSV files: the last word of a text is its label, or tells it."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    labels = {"colours": {"red": "red", "green": "green"}, "pets": {"cat": "old_cat", "dog": "new-dog"}}
    for name, label_of in labels.items():
        texts = {
            " ".join([*draw.choices(WORDS[5:], k=6), last]): label for last, label in label_of.items() for _ in "a" * 40
        }
        lines = ["text,label", *(f"{text},{label}" for text, label in texts.items())]
        (folder / f"{name}.csv").write_text("\n".join(lines))
    return {name: folder / f"{name}.csv" for name in labels}


@pytest.fixture(scope="session")
def toy_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tasks as folders of images: which colour, and whether the upper or the lower half is bright."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    classes = {"colours": ["red", "green"], "halves": ["lower", "upper"]}
    for name, labels in classes.items():
        for number, label in enumerate(labels):
            for count in range(24):
                pixels = draw.integers(0, 90, (20, 18, 3))
                bright = (..., number) if name == "colours" else (slice(10) if number else slice(10, None),)
                pixels[bright] += 160
                file = folder / name / label / f"{count}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(file)
    return {name: folder / name for name in classes}


@pytest.fixture(scope="session")
def settings(toy_files: dict[str, Path], tiny_model_folder: Path) -> RunSettings:
    """Those of a run of two toy tasks, two steps each."""
    data = DataOptions(
        tasks=tuple(f"{name}={toy_files[name]}" for name in ("colours", "warm")),
        shots=4,
        validation_shots=3,
        test_size=8,
    )
    method = QTuningConfig(prompt_length=2, shared_length=2, queue_size=2)
    return RunSettings(
        str(tiny_model_folder), data, method, TrainingOptions(steps=2, batch_size=4, max_length=10, eval_every=2)
    )


@pytest.fixture(scope="session")
def finished_run(settings: RunSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_stream(settings, folder, lambda tasks, title: nullcontext(RunListener()))
    return folder
