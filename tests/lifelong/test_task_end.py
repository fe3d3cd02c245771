"""Heads at the end of a task: what they are mixed from, and that runs do so."""

from __future__ import annotations

import pytest
import torch
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.lifelong import task_end
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.evaluation import features
from qtuning_fast.lifelong.task_end import mix_head
from qtuning_fast.method.closed_form import LinearHead, closed_form_head


def encoded(labels: list[int], shift: int) -> EncodedExamples:
    numbers = torch.tensor(labels)
    ids = 1 + (torch.arange(6) * 7 + numbers[:, None] * 3 + shift + torch.arange(len(numbers))[:, None]) % 38
    return EncodedExamples({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": numbers})


@pytest.fixture
def model(tiny_bert: BertModel) -> QTuningModel:
    torch.manual_seed(0)
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=2, shared_length=1, queue_size=3))
    model.start_task("first", 2)
    return model


def test_a_head_is_mixed_under_the_prompt_as_it_is_now(model: QTuningModel) -> None:
    train, validation = encoded([0, 1] * 5, 0), encoded([0, 1] * 4, 5)
    with torch.no_grad():  # as a step does, which leaves the placed prompt behind
        for parameter in model.training_prefix.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    head = model.learning.head
    assert head is not None
    before = LinearHead(*(part.detach().double().clone() for part in (head.weight, head.bias)))
    mix_head(model, train, validation, 4)
    model.set_task("first")
    seen = [features(model, split, 4, task="first") for split in (train, validation)]
    labels = torch.cat([split.columns["labels"] for split in (train, validation)])
    wanted = before.of_unit_norm().weight + closed_form_head(torch.cat(seen), labels, 2).of_unit_norm().weight
    found = head.weight.detach().double()
    found, wanted = found - found.mean(0), wanted - wanted.mean(0)
    torch.testing.assert_close(found / found.norm(), wanted / wanted.norm(), rtol=1e-4, atol=1e-5)


def test_of_very_many_examples_some_are_read(model: QTuningModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(task_end, "MOST_EXAMPLES", 3)
    monkeypatch.setattr(task_end, "features", lambda *args, **kwargs: read.append(args[1]) or features(*args, **kwargs))
    mix_head(model, encoded([0, 1] * 9, 0), encoded([0, 1, 1, 1, 1], 5), 4)
    assert [len(each) for each in read] == [6, 4]
