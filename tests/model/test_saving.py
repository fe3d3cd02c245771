"""From a model to its checkpoint and back; what files hold is tested in test_checkpoint.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from qtuning_fast import QTuningModel
from qtuning_fast.model.checkpoint import write_checkpoint
from qtuning_fast.model.hub_files import Located
from qtuning_fast.model.saving import checkpoint_of, restored


def test_a_model_comes_back_with_all_that_is_saved(tiny_bert: BertModel, learned: Any, tmp_path: Path) -> None:
    model = learned(tiny_bert, 3)
    saved = checkpoint_of(model)
    assert "_extra_state" not in saved.learning and saved.last_learned == "task-2" and not saved.is_of_one_task
    write_checkpoint(tmp_path, saved)
    again = restored(QTuningModel, model.detach(), Located("here", tmp_path), lazy=False)
    found = checkpoint_of(again)
    for one, other in ((saved.learning, found.learning), (saved.queue, found.queue)):
        assert one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())
    assert (found.config, found.fingerprint, found.last_learned) == (saved.config, saved.fingerprint, "task-2")


def test_one_task_comes_back_without_a_past(tiny_bert: BertModel, learned: Any, tmp_path: Path) -> None:
    model = learned(tiny_bert, 3)
    model.save_pretrained(tmp_path, task="task-1")
    assert [path.name[:8] for path in tmp_path.glob("*.safetensors")] == ["task-000"]
    again = restored(QTuningModel, model.detach(), Located("here", tmp_path), lazy=False)
    assert again.tasks == ["task-1"] and len(again.training_prefix.queue) == 0
    assert again.learning.last_learned is None and not again.retains_memory
    with pytest.raises(ValueError, match="task 'task-0' is not among"):
        again.save_pretrained(tmp_path, task="task-0")


def test_a_base_model_that_does_not_fit_is_as_it_was(
    tiny_bert: BertModel, tiny_config: Any, learned: Any, tmp_path: Path
) -> None:
    learned(tiny_bert, 1).save_pretrained(tmp_path)
    other = BertModel(tiny_config(num_hidden_layers=2))
    with pytest.raises(ValueError, match="user/adapters was made for another base model: a BertModel"):
        restored(QTuningModel, other, Located("user/adapters", tmp_path), lazy=False)
    assert isinstance(other.config, BertConfig) and all(each.requires_grad for each in other.parameters())
    QTuningModel(other, learned(BertModel(tiny_config()), 0).qtuning_config)
