"""Each method by name is what its paper says, seen in the prefixes of a stream of toy tasks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast import LifelongTrainer, QTuningConfig, QTuningModel
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.data.loading import load_task
from qtuning_fast.lifelong.methods import METHODS, Q_TUNING, method_by_name
from qtuning_fast.lifelong.metrics import unnamed_results
from qtuning_fast.lifelong.options import HEAD_STARTS, TrainingOptions
from qtuning_fast.lifelong.tasks import Examples, Task
from qtuning_fast.method.labels import MULTI, REGRESSION

NEW = 2  # rows of a prompt
CONFIG = {"prompt_length": NEW, "shared_length": 3, "queue_size": 3}
TRAINING = {"steps": 4, "batch_size": 4, "max_length": 10, "eval_every": 4, "prompt_rate": 0.03, "head_rate": 0.03}
SIZES: dict[str, Any] = {"shots": 6, "validation_shots": 3, "test_size": 12}

COLOURS, ANIMALS = ["red", "green", "blue", "yellow"], ["cat", "dog", "horse", "bird"]


@pytest.fixture(scope="module")
def run(toy_files: dict[str, Path], tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The metrics of a run of four tasks by a method, and its model."""
    found: dict[str, tuple[dict[str, Any], Path]] = {}

    def run(
        name: str, config: Any = None, training: Any = None, rule: str | None = None
    ) -> tuple[dict[str, Any], QTuningModel]:
        base, tokenizer = load_base_model(str(tiny_model_folder))
        key = f"{name} {config} {training}"
        if key not in found:
            method = method_by_name(name)
            own = method.config.keys() | method.training.keys()
            given = [{key: x for key, x in part.items() if key not in own} for part in (CONFIG, TRAINING)]
            tasks = [load_task(f"{task}={path}", **SIZES) for task, path in toy_files.items()]
            settings = method.settings(given[0] | (config or {}), given[1] | (training or {}))
            folder = tmp_path_factory.mktemp(name) / "run"
            trainer = LifelongTrainer(
                base,
                tokenizer,
                settings[0],
                tasks,
                settings[1],
                folder,
                forward_transfer=name == "probe",
                task_rule=rule or "closed-form",
            )
            found[key] = trainer.run(), folder / "adapter"
        metrics, saved = found[key]
        return metrics, QTuningModel.from_pretrained(base, saved)

    return run


def rows(model: QTuningModel, layer: int = 1) -> list[Tensor]:
    """The keys and values of each task in a layer, `[P, F]`."""
    adapters = [model.adapters[name] for name in model.tasks]
    to_rows = model.training_prefix.rows[layer].shape.to_rows
    return [to_rows(adapter.keys[layer], adapter.values[layer]) for adapter in adapters]


def test_q_tuning_is_the_defaults() -> None:
    assert METHODS[Q_TUNING].settings() == (QTuningConfig(), TrainingOptions())


def published(run: Any, name: str) -> tuple[dict[str, Any], QTuningModel]:
    """A run of HiDe-Prompt or NoRGa on a model with two layers."""
    more = {"batch_size": 4, "joint_epochs": 2, "steps": 12, "prompt_rate": 0.1, "head_rate": 0.03}
    return run(name, {"layers": (0,), "prompt_length": NEW}, more)


def test_hide_has_a_prompt_per_task_that_starts_from_the_last_one_and_one_head(run: Any) -> None:
    metrics, model = published(run, "hide")
    settings = metrics["config"]
    assert settings["method"]["prompt_init"] == "uniform" and settings["training"]["start_from"] == "previous"
    assert [task["prefix_rows"] for task in metrics["per_task"]] == [NEW] * 4
    assert [task["start"]["chosen"]["rows"] for task in metrics["per_task"]] == ["random", *["prompt"] * 3]
    assert all(adapter.gate is None for adapter in model.adapters.values()) and model.training_prefix.gates == []
    first, second, *_ = rows(model, layer=0)
    assert first.abs().mean() > 0.3  # U(−1, 1): 0.5 on average
    assert (second - first).abs().mean() < 0.5 * first.abs().mean()
    assert "joint_head" in metrics["class_incremental"]


def test_earlier_prompts_are_mixed_into_a_new_one(run: Any) -> None:
    plain, mixed = (
        run("prompt-per-task", {"reparameterization": None}, {"prompt_momentum": share})[1] for share in (0.0, 0.25)
    )
    before, after = rows(plain), rows(mixed)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(after[1], 0.75 * before[1] + 0.25 * before[0])
    with pytest.raises(
        ValueError, match=r"prompt_momentum is 0\.25, .* but reparameterization is 'mlp'; set it to None"
    ):
        run("prompt-per-task", {}, {"prompt_momentum": 0.25})
    with pytest.raises(ValueError, match=r"prompt_momentum is 0\.25, but prompt_length is 0"):
        run("prompt-per-task", {"prompt_length": 0, "reparameterization": None}, {"prompt_momentum": 0.25})
    with pytest.raises(ValueError, match=r"prompt_momentum is 1\.5; it must be 1 at most"):
        TrainingOptions(prompt_momentum=1.5)


def test_norga_is_hide_with_a_gate_that_the_first_task_trains(run: Any) -> None:
    _, model = published(run, "norga")
    first, *others = model.adapters.values()
    assert first.gate == "tanh" and float(first.alphas[0]) != 1
    for other in others:
        assert torch.equal(first.alphas[0], other.alphas[0]) and torch.equal(first.taus[0], other.taus[0])
    hide, norga = METHODS["hide"], METHODS["norga"]
    assert norga.config.items() - hide.config.items() == {("gate", "tanh"), ("gate_training", "first-task")}
    assert norga.training.items() - hide.training.items() == {("gate_rate", None)}
    assert TrainingOptions(gate_rate=None, prompt_rate=0.5).rates("sequence-classification")["gate"] == 0.5


@pytest.mark.parametrize("name", ["simple-cil", "ranpac", "probe-joint"])
def test_what_needs_no_prompts(run: Any, name: str) -> None:
    metrics, _ = run(name, rule=METHODS[name].rule)
    answers = unnamed_results(metrics)[METHODS[name].answers]
    assert 0 < answers["average_accuracy"] <= 1
    assert all(task["steps"] == 0 and task["prefix_rows"] == 0 for task in metrics["per_task"])
    if METHODS[name].rule is not None:
        assert metrics["class_incremental"]["rule"] == METHODS[name].rule


def test_epochs_are_steps(run: Any) -> None:
    options = TrainingOptions(epochs=3, batch_size=8)
    assert [options.for_examples(count).steps for count in (8, 9, 1)] == [3, 6, 3]
    assert TrainingOptions(steps=7).for_examples(100).steps == 7
    metrics, _ = run("prompt-per-task", training={"epochs": 2, "eval_every": 2})
    assert [task["steps"] for task in metrics["per_task"]] == [
        2 * -(-task["num_train"] // 4) for task in metrics["per_task"]
    ]
    with pytest.raises(ValueError, match="epochs is 0; it must be at least 1"):
        TrainingOptions(epochs=0)


def test_progressive_prompts_keep_every_prompt_as_it_was_trained(run: Any) -> None:
    metrics, model = run("progressive-prompts")
    assert [task["prefix_rows"] for task in metrics["per_task"]] == [NEW, 2 * NEW, 3 * NEW, 4 * NEW]
    prefixes = rows(model)
    for before, after in pairwise(prefixes):
        assert torch.equal(after[NEW:], before)  # frozen and unweighted, behind the new prompt
    assert model.adapters["pets"].gate is None and model.training_prefix.queue.evictions == 0
    assert not any(task["retention_curve"] for task in metrics["per_task"])


@pytest.mark.parametrize("name", ["prompt-per-task", "one-prompt"])
def test_a_single_prompt_is_all_that_a_task_computes_with(run: Any, name: str) -> None:
    metrics, model = run(name)
    assert [task["prefix_rows"] for task in metrics["per_task"]] == [NEW] * 4
    assert model.adapters["pets"].gate is None and len(model.training_prefix.queue) == 0
    assert not any(task["retention_curve"] for task in metrics["per_task"])


def test_of_prompts_and_of_one_prompt_only_the_latter_starts_where_the_last_task_ended(run: Any) -> None:
    for name, carried in (("prompt-per-task", False), ("one-prompt", True)):
        metrics, model = run(name)
        starts = [task["start"]["chosen"]["donor"] for task in metrics["per_task"]]
        assert starts == [None, *(model.tasks[:3] if carried else [None] * 3)]
        last = rows(model)[-1]
        model.start_task("next", 2, start_from=method_by_name(name).settings()[1].start_from)
        start = model.training_prefix.rows[1].prompt
        assert torch.equal(start, last) == carried


def test_the_probe_answers_as_the_baseline_does_and_has_no_prompts(run: Any) -> None:
    metrics, model = run("probe")
    assert [task["prefix_rows"] for task in metrics["per_task"]] == [0] * 4
    assert [task["steps"] for task in metrics["per_task"]] == [0] * 4
    probe = metrics["baselines"]["linear_probe"]["accuracy"]
    for evaluation in ("task_adapter", "live_queue"):
        assert metrics[evaluation]["accuracy_matrix"][-1] == probe
        assert metrics[evaluation]["forward_transfer"] == 0
    with model.keeping_task(), torch.no_grad():
        inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
        plain = model.features(inputs, task=None)
        torch.testing.assert_close(model.features(inputs, task="pets"), plain)


def test_what_is_given_takes_precedence_over_the_method_and_is_named() -> None:
    method = METHODS["prompt-per-task"]
    config, training = method.settings({"gate": "gelu", "rank": 2}, {"steps": 7})
    assert (config.gate, config.rank, config.queue_size, training.steps) == ("gelu", 2, 1, 7)
    assert method.changed(config, training) == {"gate": "gelu"}  # the others are not the method's
    assert method.without({"gate"}).config == {name: x for name, x in method.config.items() if name != "gate"}
    assert not method.changed(*method.settings())


def test_the_probe_takes_no_steps_however_many_it_may_take() -> None:
    method = METHODS["probe"]
    config, training = method.settings(training={"steps": 60, "batch_size": 4})
    assert (training.steps, training.batch_size) == (0, 4) and not method.changed(config, training)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method is 'lora'; it must be one of 'q-tuning', 'progressive-prompts'"):
        method_by_name("lora")


def test_settings_that_would_leave_something_random_are_refused(
    toy_files: dict[str, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="steps is 0, so a head would stay random"):
        TrainingOptions(steps=0, start_from="random", head_start="random")
    base, tokenizer = load_base_model(str(tiny_model_folder))
    tasks = [load_task(f"colours={toy_files['colours']}", shots=4, validation_shots=3, test_size=8)]
    with pytest.raises(ValueError, match="start_from is 'validation', which judges starts by heads in closed form"):
        TrainingOptions(start_from="validation", head_start="random")
    assert [TrainingOptions(head_start=each).starts_from for each in HEAD_STARTS] == ["validation", "random", "random"]
    nothing = TrainingOptions(steps=0, head_start="probe", start_from="random")
    with pytest.raises(ValueError, match="steps is 0, so prompts would not be trained"):
        LifelongTrainer(base, tokenizer, QTuningConfig(**CONFIG), tasks, nothing, tmp_path / "run")
    config = QTuningConfig(task_type="text-to-text")
    with pytest.raises(ValueError, match="head_start is 'probe', but task_type='text-to-text' has no heads"):
        LifelongTrainer(base, tokenizer, config, tasks, replace(nothing, steps=1), tmp_path / "run")
    unknown = TrainingOptions(start_from="films")
    with pytest.raises(ValueError, match=r"start_from is 'films'; it must be .*or one of the tasks: colours"):
        LifelongTrainer(base, tokenizer, QTuningConfig(**CONFIG), tasks, unknown, tmp_path / "run")
    with pytest.raises(ValueError, match="prompt_length is 0, but task_type='causal-lm' has no heads"):
        QTuningConfig(prompt_length=0, task_type="causal-lm")


def test_a_head_may_start_as_the_probe_beside_prompts(
    run: Any, toy_files: dict[str, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    _, probe = run("probe")
    base, tokenizer = load_base_model(str(tiny_model_folder))
    tasks = [load_task(f"colours={toy_files['colours']}", **SIZES)]
    training = TrainingOptions(
        **TRAINING | {"head_start": "probe", "start_from": "random", "head_rate": 0.0, "head_end": "trained"}
    )
    LifelongTrainer(base, tokenizer, QTuningConfig(**CONFIG), tasks, training, tmp_path / "run").run()
    head, wanted = (
        model.adapters["colours"].head_weight
        for model in (QTuningModel.from_pretrained(base, tmp_path / "run" / "adapter"), probe)
    )
    assert head is not None and wanted is not None and torch.equal(head, wanted) and head.any()


@pytest.mark.parametrize("problem_type", [MULTI, REGRESSION])
def test_the_probe_of_labels_and_of_numbers_is_the_baseline_too(
    problem_type: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    texts = [
        f"the {colour} {animal} {word}" for colour in COLOURS for animal in ANIMALS for word in ("is", "was", "old")
    ]
    multi = problem_type == MULTI
    labels = [(int("red" in text), int("cat" in text)) if multi else float(len(text)) for text in texts]
    parts = [Examples(texts[k::3], labels[k::3]) for k in range(3)]
    task = Task("task", ["red", "cat"] if multi else ["length"], *parts, source="toy", problem_type=problem_type)
    base, tokenizer = load_base_model(str(tiny_model_folder))
    config, training = METHODS["probe"].settings(training={"max_length": 10})
    metrics = LifelongTrainer(base, tokenizer, config, [task], training, tmp_path / "run").run()
    found = metrics["task_adapter"]["accuracy_matrix"][0][0]
    assert found == pytest.approx(metrics["baselines"]["linear_probe"]["accuracy"][0], abs=1e-6)
