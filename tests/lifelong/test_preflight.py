"""Errors that a run would hit later are found before it starts, and the checks change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from qtuning_fast import QTuningConfig
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.tasks import Task, few_shot_split
from qtuning_fast.lifelong.trainer import LifelongTrainer

METHOD = QTuningConfig(prompt_length=2, queue_size=2, shared_length=2)
OPTIONS = TrainingOptions(steps=2, batch_size=4, max_length=8, eval_every=2)


def toy(*more: str) -> Task:
    texts = [f"the {word} {i} {label}" for i in range(12) for word in ("cat", "dog") for label in ("red", "green")]
    labels = [text.split()[-1] for text in texts] + ["red"] * len(more)
    return few_shot_split([*texts, *more], labels, name="toy", shots=None, validation_shots=2, test_size=4, seed=0)


def lifelong(model: Any, folder: Path, *tasks: Task, **changes: Any) -> LifelongTrainer:
    arguments: dict[str, Any] = {"config": METHOD, "options": OPTIONS} | changes
    return LifelongTrainer(*model, tasks=tasks, folder=folder / "run", **arguments)


def test_a_text_without_tokens_is_named(folders_of_models: dict[str, Path], tmp_path: Path) -> None:
    base, tokenizer = load_base_model(str(folders_of_models["text-to-text"]), "text-to-text")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("!", "")
    tokenizer.backend_tokenizer.post_processor = None
    method = QTuningConfig(prompt_length=2, queue_size=2, shared_length=2, task_type="text-to-text")
    with pytest.raises(ValueError, match="task 'toy': the text '!!' has no tokens; leave it out"):
        lifelong((base, tokenizer), tmp_path, toy("!!"), config=method).run()
    assert not (tmp_path / "run").exists()


def test_what_training_raises_is_raised_before_the_folder_is_made(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base_model(str(tiny_model_folder))
    before = {name: tensor.clone() for name, tensor in model[0].state_dict().items()}
    run = lifelong(model, tmp_path, toy())

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr("qtuning_fast.model.model.QTuningModel.forward", broken)
        with pytest.raises(ValueError, match="this BertModel cannot learn task 'toy': out of order"):
            run.run()
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model[0].state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model[0].parameters())
    assert run.run()["tasks"] == ["toy"]


def test_a_resumed_run_is_not_checked_again(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base_model(str(tiny_model_folder))
    lifelong(model, tmp_path, toy()).run()
    monkeypatch.delattr("qtuning_fast.lifelong.trainer.preflight")
    assert lifelong(model, tmp_path, toy()).run()["tasks"] == ["toy"]
