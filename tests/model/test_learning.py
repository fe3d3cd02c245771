"""What trains while a task is in training, and what memory retention reaches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.method.prompts import LayerShape
from qtuning_fast.model.learning import Learning
from qtuning_fast.model.training_prefix import TrainingPrefix

Batch = dict[str, Tensor]
LABELS = torch.tensor([0, 1, 1, 0])
SMALL = {"prompt_length": 3, "queue_size": 3, "shared_length": 2}


def small_config(**changes: Any) -> QTuningConfig:
    return QTuningConfig(**(SMALL | changes))


def gradients(model: QTuningModel) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_what_trains_and_what_is_frozen(tiny_bert: BertModel, batch: Batch, train: Any, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.train()
    assert model.retains_memory and not model.base_model.training
    model(**batch, labels=LABELS).loss.backward()
    for name, gradient in gradients(model).items():
        assert (gradient is None) == name.startswith("base_model."), name
    old = [layer.old.clone() for layer in model.training_prefix.rows]
    train(model, batch)
    assert all(torch.equal(layer.old, rows) for layer, rows in zip(model.training_prefix.rows, old))
    model.finish_task()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_task_starts_where_no_gradients_are_computed(tiny_bert: BertModel, batch: Batch, train: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    with torch.no_grad():
        model.start_task("first", 2)
    train(model, batch)
    assert model.finish_task().name == "first"


def test_retention_reaches_only_the_shared_prompt_and_the_discriminator(
    tiny_bert: BertModel, batch: Batch, learn: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config(reparameterization=None))
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.train()
    output = model(**batch, labels=LABELS)
    output.retention_loss.backward()
    reached = {name for name, gradient in gradients(model).items() if gradient is not None and gradient.any()}
    assert reached == {name for name, _ in model.named_parameters() if "shared" in name or "discriminator" in name}


def test_retention_targets_may_be_computed_beforehand(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.train()
    targets = model.features(batch, task="task-2")
    torch.manual_seed(5)
    here = model(**batch, labels=LABELS).retention_loss
    torch.manual_seed(5)
    assert torch.equal(model(**batch, labels=LABELS, retention_features=targets).retention_loss, here)


@pytest.mark.parametrize("changes", [{"retention_weight": 0.0}, {"shared_length": 0}])
def test_no_retention_where_there_is_nothing_to_retain(
    tiny_bert: BertModel, batch: Batch, changes: dict, learn: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config(**changes))
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.train()
    assert model(**batch, labels=LABELS).retention_loss is None and model.discriminator is None


def test_a_batch_of_one_skips_retention(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.train()
    one = {name: value[:1] for name, value in batch.items()}
    assert model(**one, labels=LABELS[:1]).retention_loss is None


def test_trainable_parameters_are_in_one_group_each(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config(rank=2))
    learn(model, batch, 3)
    model.start_task("last", 2)
    groups = model.parameter_groups()
    assert all(groups.values()) and set(groups) == {"prompt", "reweighting", "gate", "head", "network"}
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("gate" in names[id(parameter)] for parameter in groups["gate"]) and len(groups["gate"]) == 6
    assert all("reweight" in names[id(parameter)] for parameter in groups["reweighting"])


def test_two_tasks_at_once_are_refused(tiny_bert: BertModel) -> None:
    model = QTuningModel(tiny_bert, small_config())
    model.start_task("first", 2)
    with pytest.raises(RuntimeError, match="'first' is in training"):
        model.start_task("second", 2)


def test_learning_goes_on_whatever_came_and_went(
    tiny_bert: BertModel, batch: Batch, tmp_path: Path, learned: Any
) -> None:
    """Queue, shared prompt and retention go by what was learned here, not by what is in the registry."""
    labels, found = torch.tensor([0, 1, 1, 0]), []
    for changed in (False, True):
        model = learned(tiny_bert, 4)
        if changed:
            model.remove_task("task-0")
            model.add_task(replace(model.adapters["task-1"], name="from elsewhere"))
            model.save_pretrained(tmp_path)
            model = QTuningModel.from_pretrained(model.detach(), tmp_path)
        torch.manual_seed(0)
        model.start_task("next", 2)
        model.train()
        output = model(**batch, labels=labels)
        assert output.retention_loss is not None
        found.append(output.loss)
        model.detach()
    assert torch.equal(*found)


def test_a_task_may_start_where_gradients_are_off(families: Any) -> None:
    family = families["BERT"]
    model = QTuningModel(family.base_model(), QTuningConfig(**SMALL))
    with torch.no_grad():
        model.start_task("first", 2)
    model.train()
    model(**family.batch(), labels=torch.tensor([0, 1, 1])).loss.backward()


def learning(*, has_heads: bool = True) -> Learning:
    torch.manual_seed(0)
    config = small_config(queue_size=1)  # the second task evicts the first one's prompt
    return Learning(TrainingPrefix([LayerShape(2, 2, 4, 4)], config), hidden_size=8, has_heads=has_heads)


def start(part: Learning, name: str, *, retains: bool = True) -> None:
    part.start(name, ("a", "b", "c"), torch.device("cpu"), retains=retains)


def test_a_task_has_a_head_from_its_start_to_its_end() -> None:
    part = learning()
    assert part.head is None
    part.check_idle()
    start(part, "first")
    assert part.task == "first" and part.head is not None and part.head.weight.shape == (3, 8)
    with pytest.raises(RuntimeError, match="'first' is in training"):
        part.check_idle()
    features = torch.randn(5, 8)
    expected = part.logits(features.double())  # whatever the precision of the features
    adapter = part.finish()
    assert (adapter.name, adapter.label_names, part.last_learned) == ("first", ("a", "b", "c"), "first")
    assert part.task is None and part.head is None
    torch.testing.assert_close(adapter.logits(features), expected)
    with pytest.raises(RuntimeError, match="call start_task first"):
        part.finish()


def test_without_heads_the_base_models_own_is_used() -> None:
    part = learning(has_heads=False)
    start(part, "first")
    assert part.head is None and part.finish().head_weight is None


def test_learning_goes_on_after_the_last_task_was_removed(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    config = QTuningConfig(prompt_length=2, shared_length=0, retention_weight=0, gate_training="first-task")
    model = QTuningModel(tiny_bert, config)
    learn(model, batch, 2)
    model.set_task(None)
    model.remove_task("task-1")
    ended = model.training_prefix.rows[0].prompt.detach().clone()
    model.start_task("next", 2, start_from="previous")
    rows = model.training_prefix.rows[0]
    assert len(rows.old) == 4 and torch.equal(rows.old[:2], ended) and torch.equal(rows.prompt, ended)
    assert not any(gate.alpha.requires_grad for gate in model.training_prefix.gates)


@pytest.mark.parametrize("without", [{"eviction": None}, {"prompt_length": 0}, {"shared_length": 0}])
def test_without_evictions_or_shared_prompt_nothing_is_retained(
    without: dict[str, Any], tiny_bert: BertModel, batch: Batch, learn: Any
) -> None:
    model = QTuningModel(
        tiny_bert, QTuningConfig(**{"prompt_length": 2, "shared_length": 2, "queue_size": 1} | without)
    )
    learn(model, batch, 3)
    assert not model.retains_memory and model.discriminator is None
    model.set_task(None)
    model.remove_task("task-2")  # no later task needs it


def test_the_discriminator_comes_with_the_first_eviction_and_stays() -> None:
    part = learning()
    start(part, "first")
    part.finish()
    assert part.discriminator is None
    start(part, "second", retains=False)
    part.finish()
    assert part.discriminator is None  # retention is not due
    start(part, "third")
    first = part.discriminator
    assert first is not None and all(parameter.requires_grad for parameter in first.parameters())
    part.finish()
    assert not any(parameter.requires_grad for parameter in first.parameters())
    start(part, "fourth")
    assert part.discriminator is first and all(parameter.requires_grad for parameter in first.parameters())


def test_retention_pairs_each_sample_with_its_own_old_features() -> None:
    part = learning()
    for name in ("first", "second"):
        start(part, name)
        part.finish()
    new, old = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    torch.manual_seed(2)
    loss = part.retention_loss(new, old)
    torch.manual_seed(2)
    shift = int(torch.randint(1, 3, ()))
    joint, product = part.discriminator(new, old), part.discriminator(new, old.roll(shift, 0))
    torch.testing.assert_close(loss, F.softplus(-joint).mean() + F.softplus(product).mean())
    loss.backward()
    assert new.grad is not None and old.grad is None


def test_between_tasks_it_is_restored_as_it_was() -> None:
    part = learning()
    for name in ("first", "second"):
        start(part, name)
        part.finish()
    again = learning()
    again.prefix.queue.load_state_dict(part.prefix.queue.state_dict())
    again.restore(part.state_dict(), torch.device("cpu"), "second")
    assert again.last_learned == "second" and again.task is None and again.discriminator is not None
    assert not any(parameter.requires_grad for parameter in again.parameters())
    state = part.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in again.state_dict().items())


def test_a_state_of_another_task_is_refused() -> None:
    part = learning()
    start(part, "first")
    state = part.state_dict()
    del state["head.bias"]
    with pytest.raises(ValueError, match=r"missing \['head\.bias'\], unexpected \['other'\]"):
        part.load_trained(state | {"other": torch.zeros(1)})


def test_a_state_is_of_its_task_and_of_no_other(tiny_bert: BertModel) -> None:
    model = QTuningModel(tiny_bert, small_config())
    part = model.learning
    model.start_task("first", 2)
    state = part.state_dict()
    part.load_state_dict(state)
    unnamed = {name: value for name, value in state.items() if name != "_extra_state"}  # of an earlier version
    part.load_state_dict(unnamed)
    assert "_extra_state" not in unnamed
    model.finish_task()
    with pytest.raises(ValueError, match="saved within task 'first', but no task is in training"):
        part.load_state_dict(state)
    model.start_task("größer", 2)
    with pytest.raises(ValueError, match="saved within task 'first', but task 'größer' is in training"):
        model.load_trainable_state_dict(state)
    part.load_state_dict(part.state_dict())


def test_a_task_that_has_diverged_is_not_finished(tiny_bert: BertModel, batch: Batch, train: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    model.start_task("task", 2)
    train(model, batch)
    sound = {name: x.clone() for name, x in model.trainable_state_dict().items()}
    with torch.no_grad():
        model.training_prefix.rows[1].shared[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"task 'task' has diverged: prefix\._rows\.1\.shared holds values"):
        model.finish_task()
    assert model.learning.task == "task" and model.tasks == []
    model.load_trainable_state_dict(sound)
    model.finish_task()


def test_a_state_of_another_kind_is_not_converted(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    state = model.learning.state_dict()
    del state["_extra_state"]
    for wrong in (torch.ones(1), torch.tensor(1)):
        with pytest.raises(ValueError, match=r"prefix\._gates\.0\.alpha is torch\.\w+ \[1?\], not torch\.float32 \[\]"):
            model.learning.restore(state | {"prefix._gates.0.alpha": wrong}, model.device, "task-0")
    model.learning.restore(state, model.device, "task-0")
