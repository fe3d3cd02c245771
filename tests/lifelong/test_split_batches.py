"""Parts of a batch: what each process opens and computes, and that the parts make up the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.lifelong import split_batches
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.split_batches import BatchPart, SplitExamples
from qtuning_fast.method.contrast import contrastive_loss
from qtuning_fast.method.labels import IGNORED
from qtuning_fast.model import distributed


@pytest.fixture
def be_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    def be(number: int, count: int) -> None:
        for module in (distributed, split_batches):
            monkeypatch.setattr(module, "process_number", lambda: number)
        monkeypatch.setattr(distributed, "process_count", lambda: count)

    return be


class Pictures(EncodedExamples):
    """Pictures that tell when they are opened."""

    def __init__(self) -> None:
        super().__init__({"labels": torch.arange(6)})
        self.opened: list[int] = []

    def rows(self, chosen: slice) -> dict[str, torch.Tensor]:
        self.opened.append(chosen.start)
        return {"pixel_values": torch.full((1, 3), chosen.start)} | super().rows(chosen)


def test_a_process_opens_the_images_of_its_own_part_alone(be_process: Any) -> None:
    for number, own in enumerate(([5, 1], [3, 0])):
        pictures = Pictures()
        be_process(number, 2)
        batch = SplitExamples(pictures).__getitems__([5, 1, 3, 0])
        assert pictures.opened == own
        assert [int(each["labels"]) for each in batch] == [5, 1, 3, 0]
        assert ["pixel_values" in each for each in batch] == [each in own for each in (5, 1, 3, 0)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_gradients_of_parts_add_up_to_those_of_the_batch(
    be_process: Any, monkeypatch: pytest.MonkeyPatch, tiny_bert: BertModel, batch: dict[str, torch.Tensor], count: int
) -> None:
    """With memory retention, a label that does not count, and in more processes than there are samples."""
    torch.manual_seed(0)
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=2, shared_length=2, queue_size=1, retention_weight=1.0))
    for name in ("first", "second"):
        model.start_task(name, 2)
        if name == "first":
            model.finish_task()
    assert model.retains_memory
    torch.nn.init.normal_(model.discriminator.score[-1].weight)
    model.train()
    labels = torch.tensor([0, 1, IGNORED, 1])
    whole = batch | {"labels": labels, "retention_features": model.features(batch, task="first")}
    trained = [each for each in model.parameters() if each.requires_grad]

    def gradients() -> list[torch.Tensor]:
        found = [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in trained]
        model.zero_grad()
        return found

    torch.manual_seed(7)
    model(**whole).loss.backward()
    expected, parts = gradients(), []
    for number in range(count):
        be_process(number, count)
        torch.manual_seed(7)
        part = BatchPart(model, whole)
        assert part.is_empty == (number >= 4) and part.num_items == 3
        if not part.is_empty:
            model(**part.inputs, retention_features=part.pairs, num_items_in_batch=part.num_items).loss.backward()
        parts.append(gradients())
    for found, each in zip(zip(*parts), expected):
        torch.testing.assert_close(sum(found), each, atol=1e-6, rtol=1e-4)


def test_parts_of_the_contrast_add_up_to_its_gradient_and_its_value(
    be_process: Any, monkeypatch: pytest.MonkeyPatch, tiny_bert: BertModel
) -> None:
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=2, shared_length=2))
    model.start_task("first", 2)
    x, means = torch.randn(5, model.hidden_size, requires_grad=True), torch.randn(3, model.hidden_size)
    expected = contrastive_loss(x, means)
    expected.backward()
    gradient, x.grad = x.grad, None
    split = [x[:3], x[3:]]
    monkeypatch.setattr(split_batches, "gathered", lambda mine: [each.detach() for each in split])
    values = []
    for number, mine in enumerate(split):
        be_process(number, 2)
        loss = BatchPart(model, {"labels": torch.zeros(5)}).contrast(mine, means)
        loss.backward(retain_graph=True)
        values.append(loss.detach())
    torch.testing.assert_close(x.grad, gradient)
    torch.testing.assert_close(sum(values), expected.detach())
