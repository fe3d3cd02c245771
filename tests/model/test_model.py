"""A frozen model that learns one task after another: what it computes, trains, saves and refuses as a whole."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainingArguments

from qtuning_fast import QTuningConfig, QTuningModel

Batch = dict[str, Tensor]
TinyConfig = Callable[..., BertConfig]
SMALL = {"prompt_length": 3, "queue_size": 3, "shared_length": 2}
LABELS = torch.tensor([0, 1, 1, 0])


def small_config(**changes: Any) -> QTuningConfig:
    return QTuningConfig(**(SMALL | changes))


# Against another implementation


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_equal_those_of_a_peft_prefix(
    batch: Batch, implementation: str, tiny_config: TinyConfig, computed: Any, logits: Any
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = BertForSequenceClassification(tiny_config(num_labels=3)).eval()
    base.set_attn_implementation(implementation)
    reference = copy.deepcopy(base)
    length = 5
    settings = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=length, num_layers=3)
    adapted = peft.get_peft_model(reference, settings).eval()
    encoder = adapted.prompt_encoder["default"]
    nn.init.normal_(encoder.embedding.weight)
    with torch.no_grad():
        expected = computed(adapted, batch)(**batch).logits
        rows = encoder(torch.arange(length)[None]).view(length, 3, 2, 4, 8)  # rows, layers, key and value, heads, size

    model = QTuningModel(base, QTuningConfig(gate=None, prompt_length=length, shared_length=0))
    model.start_task("task", 3)
    model.training_prefix.reparameterization = None
    for layer, prefix in enumerate(model.training_prefix.rows):
        key, value = rows[:, layer, 0].transpose(0, 1), rows[:, layer, 1].transpose(0, 1)
        prefix.prompt = nn.Parameter(prefix.shape.to_rows(key, value))
    model.finish_task()
    positions = torch.arange(length, length + 10).expand(4, 10)  # peft counts the prefix
    with torch.no_grad():
        ours = model.base_model(**batch, position_ids=positions).logits  # under the task that is set
    assert not torch.allclose(ours, logits(model, batch, None))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


# Tasks


def test_older_adapters_never_change(tiny_bert: BertModel, batch: Batch, learn: Any, logits: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    before = logits(model, batch, "task-0")
    learn(model, batch, 4)
    assert torch.equal(logits(model, batch, "task-0"), before)
    assert not torch.equal(logits(model, batch, "task-0", live=True), before)


def test_mixed_batches_give_each_sample_its_own_task(
    tiny_bert: BertModel, batch: Batch, learn: Any, logits: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config(gate_per="head"))
    learn(model, batch, 4)
    model.start_task("wide", 5)
    model.finish_task()
    names = ["task-0", "wide", "task-3", "task-0"]
    model.set_task("task-1")
    mixed = model(**batch, task_names=names).logits
    assert mixed.shape == (4, 5)
    for row, name in enumerate(names):
        own = logits(model, batch, name)[row]
        torch.testing.assert_close(mixed[row, : len(own)], own)
        assert mixed[row, len(own) :].isneginf().all()
    assert model(**batch, task_names=names, labels=LABELS).loss.isfinite()


# What trains


def test_gradient_checkpointing_gives_the_same_gradients(batch: Batch, tiny_config: TinyConfig, learn: Any) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = BertModel(tiny_config())
        model = QTuningModel(base, small_config())
        learn(model, batch, 3)
        model.start_task("last", 2)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        assert [layer.training for layer in base.encoder.layer] == [checkpointing] * 3
        assert not any(dropout.training for dropout in base.modules() if isinstance(dropout, nn.Dropout))
        torch.manual_seed(1)
        model(**batch, labels=LABELS).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*found):
        torch.testing.assert_close(plain, checkpointed)


def test_what_trains_is_counted(tiny_bert: BertModel, capsys: pytest.CaptureFixture[str]) -> None:
    model = QTuningModel(tiny_bert, small_config(reparameterization=None))
    model.start_task("task", 2)
    model.print_trainable_parameters()
    rows, head = 3 * 5 * 64, 2 * 33
    assert f"trainable: {rows + 6 + head:,} of" in capsys.readouterr().out  # six: an alpha and a tau a layer


def test_embeddings_instead_of_tokens(tiny_bert: BertModel, batch: Batch, learn: Any, logits: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    embedded = {"inputs_embeds": tiny_bert.embeddings.word_embeddings(batch["input_ids"])}
    expected = logits(model, batch, "task-0")
    torch.testing.assert_close(model(**embedded, attention_mask=batch["attention_mask"]).logits, expected)


# Saving


@pytest.mark.parametrize("tasks", [0, 1, 4])
def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened(
    tiny_bert: BertModel, batch: Batch, tmp_path: Any, tasks: int, learn: Any, logits: Any
) -> None:
    torch.manual_seed(0)
    same_base = copy.deepcopy(tiny_bert)
    model = QTuningModel(tiny_bert, small_config(rank=2, gate_per="head"))
    learn(model, batch, tasks)
    model.save_pretrained(tmp_path)
    loaded = QTuningModel.from_pretrained(same_base, tmp_path)
    assert loaded.tasks == model.tasks and loaded.qtuning_config == model.qtuning_config
    continued, orders = [], []
    for each in (model, loaded):
        torch.manual_seed(7)
        each.start_task("next", 2)
        orders.append([name for name, _ in each.named_parameters()])
        each.finish_task()
        learn(each, batch, 2)
        names = each.tasks
        continued.append([logits(each, batch, name, live=live) for name in names for live in (False, True)])
    assert all(torch.equal(a, b) for a, b in zip(*continued))
    assert orders[0] == orders[1]


# Errors


def refused() -> Iterator[tuple[str, Any, type[Exception], str]]:
    yield "attentions", lambda m, b: m(**b, output_attentions=True), ValueError, "output_attentions"
    yield "no such task", lambda m, b: m.set_task("nothing"), ValueError, "'nothing'.*task-0"
    yield "same name", lambda m, b: m.start_task("task-0", 2), ValueError, "name.*task-0"
    yield "empty name", lambda m, b: m.start_task("", 2), ValueError, "name"
    yield "no name", lambda m, b: m.start_task(["a"], 2), TypeError, "name"
    yield "no labels", lambda m, b: m.start_task("new"), TypeError, "num_labels"
    yield "one label", lambda m, b: m.start_task("new", 1), ValueError, "num_labels"
    yield "labels twice", lambda m, b: m.start_task("new", label_names=["a", "a"]), ValueError, "labels"
    yield "labels differ", lambda m, b: m.start_task("new", 3, label_names=["a", "b"]), ValueError, "num_labels"
    yield "bool labels", lambda m, b: m.start_task("new", True), TypeError, "num_labels"
    yield "nothing to finish", lambda m, b: m.finish_task(), RuntimeError, "start_task"
    yield "too few names", lambda m, b: m(**b, task_names=["task-0"]), ValueError, "task_names"
    yield "4-D mask", lambda m, b: m(b["input_ids"], b["attention_mask"][:, None, None]), ValueError, "attention_mask"
    yield "tuple output", lambda m, b: m(**b, return_dict=False), ValueError, "return_dict"
    yield "labels of others", lambda m, b: m(**b, labels=LABELS + 1, task_names=["task-0"] * 4), ValueError, "labels"
    yield "unknown among names", lambda m, b: m(**b, task_names=["task-0"] * 3 + ["x"]), ValueError, "'x'"


@pytest.mark.parametrize(("call", "error", "named"), [pytest.param(*case[1:], id=case[0]) for case in refused()])
def test_calls_that_are_refused_change_nothing(
    tiny_bert: BertModel, batch: Batch, call: Any, error: type[Exception], named: str, learn: Any, logits: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    expected = logits(model, batch, "task-0")
    with pytest.raises(error, match=named):
        call(model, batch)
    assert torch.equal(model(**batch).logits, expected) and model.tasks == ["task-0"]


def test_a_model_that_was_sharded_as_a_whole_says_what_to_shard(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    model.start_task("task", 2)
    model.__class__ = type("FSDPQTuningModel", (QTuningModel,), {"unshard": None})  # as fully_shard does
    with pytest.raises(RuntimeError, match="call it with the base model before attaching"):
        model(**batch, labels=LABELS)


def test_mixed_batches_under_autocast(tiny_bert: BertModel, batch: Batch, learn: Any, logits: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch, task_names=["task-0", "task-1"] * 2).logits
    torch.testing.assert_close(mixed[1], logits(model, batch, "task-1")[1], atol=0.05, rtol=0.05)


def test_it_trains_in_another_precision_too(tiny_bert: BertModel, batch: Batch, train: Any, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.to(torch.bfloat16)
    train(model, batch)
    assert model.finish_task().prefix_rows == 11


# With others


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_trains_it_with_its_defaults(
    tiny_bert: BertModel, batch: Batch, tmp_path: Any, checkpointing: bool, learn: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 3)
    model.start_task("last", 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{name: value[i] for name, value in batch.items()} | {"labels": LABELS[i]} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], gradient_checkpointing=checkpointing, use_cpu=True, save_strategy="no"
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("base_model."), name


@pytest.mark.gpu
def test_on_a_gpu_it_learns_moves_saves_and_goes_on(
    tiny_bert: BertModel, batch: Batch, tmp_path: Any, learn: Any, logits: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 2)
    there = {name: value.cuda() for name, value in batch.items()}
    expected = logits(model, batch, "task-1")
    model.cuda()
    torch.testing.assert_close(logits(model, there, "task-1").cpu(), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = QTuningModel.from_pretrained(model.detach(), tmp_path)
    for number in range(3):
        loaded.start_task(f"more-{number}", 2)
        loaded.train()
        loaded(**there, labels=LABELS.cuda()).loss.backward()
        loaded.finish_task()
    assert logits(loaded, there, "more-2").isfinite().all()


def test_a_model_without_a_task_set_can_be_pickled(tiny_bert: BertModel, batch: Batch, learn: Any) -> None:
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=2, shared_length=2))
    learn(model, batch, 2)
    name = model.tasks[0]
    model.set_task(name)
    expected = model.eval()(**batch).logits
    model.set_task(None)
    other = pickle.loads(pickle.dumps(model))
    other.set_task(name)
    assert torch.equal(other(**batch).logits, expected)


def test_the_parts_still_have_their_names_of_version_0_1(tiny_bert: BertModel) -> None:
    model = QTuningModel(tiny_bert, QTuningConfig())
    assert model.live is model.training_prefix and model.bank is model.slots
