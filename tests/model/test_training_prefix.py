"""The training prefix: its rows, its gates and its queue, from one task to the next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.method.prompts import LayerShape
from qtuning_fast.model.training_prefix import TrainingPrefix

Batch = dict[str, Tensor]
SMALL = {"prompt_length": 3, "queue_size": 3, "shared_length": 2}


def small_config(**changes: Any) -> QTuningConfig:
    return QTuningConfig(**(SMALL | changes))


@pytest.mark.parametrize("gate_per", ["layer", "head"])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_finished_task_answers_as_it_did_in_training(
    tiny_bert: BertModel, batch: Batch, gate_per: str, rank: int, train: Any, logits: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config(gate_per=gate_per, rank=rank))
    for task in range(5):
        model.start_task(f"task-{task}", 2)
        train(model, batch)
        trained = logits(model, batch, f"task-{task}")
        model.finish_task()
        torch.testing.assert_close(logits(model, batch, f"task-{task}"), trained)
        torch.testing.assert_close(logits(model, batch, f"task-{task}", live=True), trained)


def test_prefixes_grow_until_the_queue_is_full_and_then_stay(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 7, steps=1)
    assert [adapter.prefix_rows for adapter in model.adapters.values()] == [5, 8, 11, 11, 11, 11, 11]


@pytest.mark.parametrize("gate_training", ["every-task", "first-task"])
def test_gate_training(tiny_bert: BertModel, batch: Batch, gate_training: str, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config(gate_training=gate_training))
    alphas = []
    for _ in range(3):
        learn(model, batch, 1)
        alphas.append(model.training_prefix.gates[0].alpha.item())
    assert alphas[0] != 1
    assert (alphas[0] == alphas[1] == alphas[2]) == (gate_training == "first-task")


SHAPES = [LayerShape(num_heads=4, num_kv_heads=2, key_size=4, value_size=6), LayerShape(4, 2, 4, 6)]
FEATURES = 2 * (4 + 6)


def training_prefix(**changes: Any) -> TrainingPrefix:
    """Of two layers."""
    embeddings = {"embedding_size": 8} if changes.get("placement") == "input" else {}
    return TrainingPrefix(SHAPES, small_config(**changes), **embeddings)


def randomize(prefix: TrainingPrefix) -> None:
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)


def after_tasks(count: int, **changes: Any) -> TrainingPrefix:
    """A task in training after so many finished ones, its parameters at random as theirs were."""
    torch.manual_seed(0)
    prefix = training_prefix(**changes)
    for number in range(count):
        prefix.begin_task(first=not prefix.prompt_length)
        randomize(prefix)
        prefix.finish_task(f"task-{number}", ("a", "b"), None)
    prefix.begin_task(first=not prefix.prompt_length)
    randomize(prefix)
    return prefix


def test_before_the_first_task_nothing_trains() -> None:
    prefix = training_prefix()
    assert prefix.prompt_length == 0 and prefix.reparameterization is None and len(prefix.queue) == 0
    assert not any(parameter.requires_grad for parameter in prefix.parameters())


def test_rows_stand_in_order_shared_then_new_then_old() -> None:
    prefix = after_tasks(1)
    rows, arguments = prefix.rows[1], prefix.prefix().layers[1]
    assert [len(part) for part in (rows.shared, rows.prompt, rows.old)] == [2, 3, 3]
    assert arguments["prefix_key"].shape == (2, 8, 4) and arguments["prefix_value"].shape == (2, 8, 6)
    assert arguments["n_shared"] == 5  # what no weight is for
    stacked = torch.cat([rows.shared, prefix._prompts()[1], rows.old])
    torch.testing.assert_close(SHAPES[1].to_rows(arguments["prefix_key"], arguments["prefix_value"]), stacked)
    assert arguments["gate"] == "tanh" and arguments["gate_alpha"] is prefix.gates[1].alpha


@pytest.mark.parametrize("eviction", ["pca", "fifo", "random"])
def test_the_start_of_a_task_says_what_it_evicted(eviction: str) -> None:
    assert after_tasks(2, eviction=eviction).last_eviction is None
    prefix = after_tasks(3, eviction=eviction)
    assert prefix.queue.evictions == 1 and len(prefix.queue) == 6
    assert prefix.last_eviction is not None and prefix.last_eviction.policy == eviction
    prefix.finish_task("task-3", (), None)
    prefix.begin_task(first=not prefix.prompt_length)
    assert prefix.queue.evictions == 2


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_a_prompt_may_start_as_a_finished_tasks_own_rows(placement: str) -> None:
    prefix = after_tasks(2, placement=placement)  # behind shared rows and before older ones
    trained = [prompt.detach().clone() for prompt in prefix._prompts()]  # through the reparametrisation
    adapter = prefix.finish_task("task", (), None)
    prefix.begin_task(first=False)
    prefix.start_prompts(prefix.own_prompts(adapter))
    assert all(torch.equal(start, end) for start, end in zip(prefix.prompts(), trained))
    assert all(rows.prompt.requires_grad for rows in prefix.rows)
    old = [rows.old.clone() for rows in prefix.rows]
    with torch.no_grad():
        prefix.rows[0].prompt.zero_()  # nothing else changes with it
    assert all(torch.equal(rows.old, before) for rows, before in zip(prefix.rows, old))
    assert adapter.prefix_rows and all(tensor.any() for tensor in prefix.own_prompts(adapter))


def test_a_prefix_too_short_to_hold_a_prompt_of_its_own_is_refused() -> None:
    adapter = after_tasks(1).finish_task("task", (), None)
    assert adapter.embeddings is None
    short = replace(adapter, keys=tuple(key[:, :2] for key in adapter.keys), values=adapter.values)
    prefix = after_tasks(1)
    assert prefix.has_own_prompts(adapter.info) and not prefix.has_own_prompts(short.info)
    with pytest.raises(ValueError, match="task 'task' has 2 prefix rows"):
        prefix.own_prompts(short)


def test_the_mean_of_the_queue_is_that_of_its_prompts() -> None:
    assert after_tasks(0).queue_mean() is None
    prefix = after_tasks(2)
    found = prefix.queue_mean()
    assert found is not None
    for mean, rows in zip(found, prefix.queue.rows):
        torch.testing.assert_close(mean, (rows[:3] + rows[3:]) / 2)


def test_the_pull_on_the_reweighting_is_its_mean_squared_distance_from_where_it_starts() -> None:
    assert after_tasks(0).reweighting_loss().item() == 0
    assert after_tasks(3, reweighting=None).reweighting_loss().item() == 0
    prefix = after_tasks(3)
    prefix.finish_task("task-3", (), None)
    prefix.begin_task(first=False)
    assert prefix.reweighting_loss().item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        for reweighting in prefix.reweightings:
            reweighting.V.add_(0.1)
    weights = [(rows.row_weights() - rows.row_scale[:, None]).square().mean() for rows in prefix.rows]
    loss = prefix.reweighting_loss()
    torch.testing.assert_close(loss, sum(weights) / len(weights))
    loss.backward()
    assert all(each.U.grad is not None and each.U.grad.any() for each in prefix.reweightings)


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_without_prompts_a_gate_still_trains_with_the_first_task_alone(placement: str) -> None:
    prefix = training_prefix(placement=placement, prompt_length=0, gate_training="first-task")
    for first in (True, False):
        prefix.begin_task(first=first)
        assert all(gate.alpha.requires_grad == first for gate in prefix.gates)
        prefix.finish_task(f"task {first}", (), None)
    assert len(prefix.queue) == 0 and prefix.queue.evictions == 0


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_what_is_kept_of_a_task_is_what_it_computed_with(placement: str) -> None:
    prefix = after_tasks(2, placement=placement)
    head = nn.Linear(8, 2)
    before = prefix.prefix()
    adapter = prefix.finish_task("task", ["no", "yes"], head)
    assert adapter.name == "task" and adapter.label_names == ("no", "yes") and adapter.prefix_rows == 2 + 3 + 6
    assert adapter.head_weight is not None and torch.equal(adapter.head_weight, head.weight)
    if placement == "input":
        torch.testing.assert_close(adapter.embeddings, before.embeddings.detach())
        assert adapter.keys == adapter.values == ()
        return
    assert adapter.embeddings is None
    for layer, (key, value) in enumerate(zip(adapter.keys, adapter.values)):
        arguments = before.layers[layer]
        for kind, rows in (("key", key), ("value", value)):
            U, V = arguments[f"reweight_{kind}"]
            weight = torch.ones_like(rows)
            weight[:, 5:] = torch.einsum("pr,rhd->hpd", U[5:], V)  # five shared and new rows have none
            torch.testing.assert_close(rows, (weight * arguments[f"prefix_{kind}"]).detach())


def test_what_is_kept_of_a_task_stays_while_the_next_one_trains() -> None:
    prefix = after_tasks(1)
    adapter = prefix.finish_task("task", (), nn.Linear(4, 2))
    assert prefix.reparameterization is None and not any(p.requires_grad for p in prefix.parameters())
    kept = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    prefix.begin_task(first=not prefix.prompt_length)
    randomize(prefix)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter.tensors().items())


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_the_shared_prompt_alone_is_the_start_of_the_whole(placement: str) -> None:
    prefix = after_tasks(1, placement=placement, gate_per="head")
    one = prefix.prefix()
    bank = prefix.prefix_with_shared(torch.tensor([0, 1, 1]))
    assert bank.index is not None and bank.index.tolist() == [0, 1, 1]
    assert bank.lengths is not None and bank.lengths.tolist() == [2 + 3 + 3, 2]
    for alone, both in zip(one.layers, bank.layers):
        assert alone.keys() == both.keys()
        for name in alone.keys() & {"prefix_key", "prefix_value"}:
            assert both[name].shape == (2, *alone[name].shape)
            assert torch.equal(both[name][0], alone[name]) and torch.equal(both[name][1], alone[name])
    if placement == "input":
        assert bank.embeddings is not None and torch.equal(bank.embeddings[1], one.embeddings)


def test_the_gate_is_held_fixed_under_the_shared_prompt_alone() -> None:
    prefix = after_tasks(1)
    layer = prefix.prefix_with_shared(torch.tensor([0, 1])).layers[0]
    layer["gate_alpha"][1].sum().backward()
    assert not prefix.gates[0].alpha.grad
    layer = prefix.prefix_with_shared(torch.tensor([0, 1])).layers[0]
    layer["gate_alpha"][0].sum().backward()
    assert prefix.gates[0].alpha.grad == 1


def test_without_a_gate_there_is_none_on_any_layer() -> None:
    prefix = after_tasks(0, gate=None)
    assert prefix.gates == [] and [layer["gate"] for layer in prefix.prefix().layers] == [None, None]
    assert prefix.finish_task("task", (), None).alphas == ()


def test_configs_that_do_not_fit_the_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=f"keeps 21 rows, more than the {FEATURES} features of a row"):
        TrainingPrefix(SHAPES, small_config(prompt_length=7, queue_size=4))
    TrainingPrefix(SHAPES, small_config(prompt_length=7, queue_size=4, eviction="fifo"))
    uneven = [SHAPES[0], LayerShape(4, 4, 4, 6)]
    with pytest.raises(ValueError, match=r"reparameterization='mlp' is shared by all layers.*\[20, 40\]"):
        TrainingPrefix(uneven, small_config())
    TrainingPrefix(uneven, small_config(reparameterization=None))
    TrainingPrefix(uneven, small_config(placement="input"), embedding_size=8)  # one set of rows for all layers


@pytest.mark.parametrize(
    "change",
    [
        {"rows.0": torch.zeros(3, 63)},
        {"rows.0": torch.zeros(2, 64)},
        {"rows.0": torch.zeros(3, 64, dtype=torch.long)},
        {"row_scale.1": torch.ones(2)},
        {"rows.3": torch.zeros(3, 64), "row_scale.3": torch.ones(3)},
        {"evictions": torch.tensor(-1)},
        {"evictions": torch.tensor(1.0)},
    ],
)
def test_a_queue_of_other_layers_is_refused(
    tiny_bert: BertModel, batch: Batch, learn: Any, change: dict[str, Tensor]
) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    model.start_task("next", 2)  # now the queue has rows
    state = model.training_prefix.queue.state_dict()
    assert state["rows.0"].shape == (3, 64)
    with pytest.raises(ValueError, match="is not one of this model's layers"):
        model.training_prefix.load_queue(state | change)
    model.training_prefix.load_queue(state)
