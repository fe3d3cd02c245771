"""One task on transformers.Trainer: rates, small checkpoints, and which of them are used."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel, Trainer, TrainerControl, TrainerState, TrainingArguments

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.task_trainer import StepTimer, TaskTrainer, latest_checkpoint
from qtuning_fast.method.closed_form import closed_form_head
from qtuning_fast.method.contrast import contrastive_loss

HEADS = "sequence-classification"
OPTIONS = TrainingOptions(steps=4, batch_size=4, eval_every=2, prompt_rate=0.03, head_rate=0.02, gate_rate=0.01)


@pytest.fixture
def model(tiny_bert: BertModel) -> QTuningModel:
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=2, shared_length=2))
    model.start_task("mine", label_names=["a", "b"])
    return model


def trainer(
    model: QTuningModel, folder: Path, batch: dict[str, torch.Tensor], options: TrainingOptions = OPTIONS
) -> TaskTrainer:
    examples = EncodedExamples(batch | {"labels": torch.tensor([0, 1, 0, 1])})
    return TaskTrainer(model, options, folder, train=examples, validation=examples)


def test_each_kind_of_parameter_has_its_rate(
    model: QTuningModel, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    optimizer = trainer(model, tmp_path, batch).create_optimizer()
    rates = [group["lr"] for group in optimizer.param_groups]
    kinds = list(model.parameter_groups())
    assert dict(zip(kinds, rates)) == {
        "prompt": 0.03,
        "reweighting": 0.03,
        "gate": 0.01,
        "head": 0.02,
        "network": 3e-4,
    }
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_heads_that_start_well_have_a_lower_rate_and_the_reweighting_may_have_its_own() -> None:
    assert TrainingOptions().rates(HEADS)["head"] == 1e-3
    random = TrainingOptions(start_from="random", head_start="random", prompt_rate=0.5, reweighting_rate=0.25)
    assert random.rates(HEADS) == {"prompt": 0.5, "reweighting": 0.25, "gate": 3e-2, "head": 1e-2, "network": 3e-4}
    assert TrainingOptions(head_rate=0.0).rates(HEADS)["head"] == 0


def test_the_reweighting_is_pulled_to_where_it_started(
    model: QTuningModel, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model.finish_task()
    model.start_task("next", 2)
    far = []
    for pull in (0.0, 1e4):
        options = replace(OPTIONS, steps=8, eval_every=8, reweighting_rate=0.1, reweighting_pull=pull)
        start = {name: value.clone() for name, value in model.trainable_state_dict().items()}
        trainer(model, tmp_path / str(pull), batch, options).train()
        far.append(model.training_prefix.reweighting_loss().item())
        model.load_trainable_state_dict(start)
    assert far[1] < 0.25 * far[0]


@pytest.mark.parametrize("earlier", [0, 3])
def test_features_are_pushed_away_from_earlier_classes(
    earlier: int, model: QTuningModel, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    examples = EncodedExamples(batch | {"labels": torch.tensor([0, 1, 0, 1])})
    means = torch.randn(earlier, model.hidden_size)
    task = TaskTrainer(
        model, replace(OPTIONS, contrast=0.5), tmp_path, train=examples, validation=examples, earlier_means=means
    )
    inputs = batch | {"labels": torch.tensor([0, 1, 0, 1])}
    model.train()
    loss = task.compute_loss(model, inputs) - OPTIONS.reweighting_pull * model.training_prefix.reweighting_loss()
    x = model.encode(batch)
    expected = model(**inputs).loss + 0.5 * contrastive_loss(x, means if earlier else x.new_zeros(0, x.shape[1]))
    torch.testing.assert_close(loss, expected)
    task.train_or_resume()
    assert not model.learning.head._forward_pre_hooks


@pytest.mark.parametrize("rate", [0.0, 3.0])
def test_a_start_that_no_later_state_is_better_than_is_kept(
    model: QTuningModel, batch: dict[str, torch.Tensor], tmp_path: Path, rate: float
) -> None:
    task = trainer(model, tmp_path, batch, replace(OPTIONS, prompt_rate=rate, head_rate=rate, gate_rate=0.0))
    examples, labels = model.features(batch, task=model.learning.task), torch.tensor([0, 1, 0, 1])
    model.learning.set_head(closed_form_head(examples, labels, 2).scaled(50))  # right of all, and sure of it
    before = {name: value.clone() for name, value in model.trainable_state_dict().items()}
    task.train_or_resume()
    assert task.start_score == 1.0
    if task.best_step == 0:
        assert all(torch.equal(value, before[name]) for name, value in model.trainable_state_dict().items())
    assert task.best_step == 0 or rate == 0.0 or task.state.best_metric > 1 - 1e-6


def test_training_leaves_the_best_state_and_checkpoints_without_the_base_model(
    model: QTuningModel, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    task = trainer(model, tmp_path, batch)
    task.train_or_resume()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    best = load_file(tmp_path / f"checkpoint-{task.state.best_global_step}" / "model.safetensors")
    kept = model.trainable_state_dict()
    assert best.keys() == kept.keys() and all(torch.equal(best[name], kept[name]) for name in best)
    assert not any(name.startswith("base_model.") for name in best)
    assert len(task.clock.seconds) == 4 and task.clock.median is not None and task.clock.median > 0


@pytest.mark.parametrize("use_cache", [True, False])
def test_training_leaves_the_base_models_config_as_it_was(
    use_cache: bool, model: QTuningModel, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model.config.use_cache = use_cache
    before = model.config.to_dict()
    trainer(model, tmp_path, batch).train_or_resume()
    assert model.config.to_dict() == before


def test_a_task_that_is_over_is_not_trained_again(
    model: QTuningModel, batch: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(model, tmp_path, batch).train_or_resume()
    trained = {name: tensor.clone() for name, tensor in model.trainable_state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()

    def trained_again(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(TaskTrainer, "train", trained_again)
    again = trainer(model, tmp_path, batch)
    again.train_or_resume()
    assert again.state.global_step == 4
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.trainable_state_dict().items())


def test_an_interrupted_task_is_resumed_from_its_checkpoint(
    model: QTuningModel, batch: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(model, tmp_path, batch, TrainingOptions(**{**OPTIONS.to_dict(), "steps": 2})).train_or_resume()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    loaded: list[dict[str, torch.Tensor]] = []
    load = QTuningModel.load_trainable_state_dict
    monkeypatch.setattr(
        QTuningModel, "load_trainable_state_dict", lambda self, state: (loaded.append(state), load(self, state))[1]
    )
    resumed = trainer(model, tmp_path, batch)
    resumed.train_or_resume()
    assert resumed.state.global_step == 4 and len(resumed.clock.seconds) == 2  # two of four steps were left
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded[0].items())


@pytest.mark.parametrize("damage", ["a flipped bit", "no manifest", "a missing file"])
def test_checkpoints_that_are_not_whole_are_removed(
    damage: str, model: QTuningModel, batch: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    trainer(model, tmp_path, batch).train_or_resume()
    newest = tmp_path / "checkpoint-4"
    if damage == "a flipped bit":
        content = bytearray((newest / "optimizer.pt").read_bytes())
        content[7] ^= 1
        (newest / "optimizer.pt").write_bytes(content)
    else:
        (newest / ("manifest.json" if damage == "no manifest" else "scheduler.pt")).unlink()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not newest.exists()


def test_there_may_be_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None


def test_the_timer_counts_steps() -> None:
    timer = StepTimer()
    assert timer.median is None
    arguments = (TrainingArguments(), TrainerState(), TrainerControl())
    for _ in range(3):
        timer.on_step_begin(*arguments)
        timer.on_step_end(*arguments)
    assert len(timer.seconds) == 3 and timer.median == sorted(timer.seconds)[1]


@pytest.mark.parametrize("name", ["_save", "_load_from_checkpoint", "_load_best_model"])
def test_transformers_still_calls_the_private_methods_that_are_overridden(name: str) -> None:
    assert f"self.{name}(" in inspect.getsource(Trainer) and name in vars(TaskTrainer)
