"""Models that are pushed to a hub, which stands in for the real one on localhost, and come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.model import HubError
from qtuning_fast.model.checkpoint import CONFIG_FILE
from qtuning_fast.model.model_card import CARD_FILE

Batch = dict[str, torch.Tensor]
SMALL = QTuningConfig(prompt_length=2, queue_size=3, shared_length=1, reparameterization=None)


@pytest.fixture
def learned(tiny_bert: BertModel) -> QTuningModel:
    model = QTuningModel(tiny_bert, SMALL)
    for name in ("moods", "topics"):
        model.start_task(name, label_names=["a", "b"])
        model.finish_task()
    model.set_task(None)
    return model.eval()


@torch.no_grad()
def logits(model: QTuningModel, batch: Batch, task: str) -> torch.Tensor:
    model.set_task(task)
    found = model(**batch).logits
    model.set_task(None)
    return found


def test_what_is_pushed_comes_back_to_the_bit(hub: Any, learned: QTuningModel, batch: Batch) -> None:
    expected = {task: logits(learned, batch, task) for task in learned.tasks}
    queue = learned.training_prefix.queue.state_dict()
    commit = learned.push_to_hub("alice/adapters")
    assert commit.commit_url.startswith(f"{hub.endpoint}/alice/adapters/commit/")
    assert set(hub.files("alice/adapters")) == {".gitattributes", CARD_FILE, CONFIG_FILE} | {
        name for name in hub.files("alice/adapters") if name.endswith(".safetensors")
    }
    model = QTuningModel.from_pretrained(learned.detach(), "alice/adapters").eval()
    assert model.tasks == ["moods", "topics"]
    assert all(torch.equal(logits(model, batch, task), x) for task, x in expected.items())
    again = model.training_prefix.queue.state_dict()
    assert queue.keys() == again.keys() and all(torch.equal(again[name], x) for name, x in queue.items())
    model.start_task("more", 2)  # learning goes on


def test_a_push_leaves_the_adapters_where_they_are(hub: Any, learned: QTuningModel, tmp_path: Path) -> None:
    learned.save_pretrained(tmp_path / "here")
    learned.push_to_hub("alice/adapters")
    assert {entry.file.folder for entry in learned.adapters.entries()} == {(tmp_path / "here").resolve()}
