import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, Trainer, TrainingArguments

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.model.checked_files import read_json, write_json
from qtuning_fast.model.checkpoint import read_checkpoint

Batch = dict[str, Tensor]
TinyConfig = Callable[..., BertConfig]
SMALL = {"prompt_length": 3, "queue_size": 3, "shared_length": 2}
LABELS = torch.tensor([0, 1, 1, 0])


def small_config(**changes: Any) -> QTuningConfig:
    return QTuningConfig(**(SMALL | changes))


def train(model: QTuningModel, batch: Batch, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=LABELS).loss.backward()
        optimizer.step()
    model.eval()


def learn(model: QTuningModel, batch: Batch, tasks: int, steps: int = 3) -> None:
    for _ in range(tasks):
        model.start_task(f"task-{len(model.tasks)}", 2)
        train(model, batch, steps)
        model.finish_task()


def logits(model: QTuningModel, batch: Batch, task: str | None, *, live: bool = False) -> Tensor:
    model.set_task(task, live=live)
    with torch.no_grad():
        return model(**batch).logits


def attributes(model: nn.Module) -> list[tuple[str, list[str], bool]]:
    return [(name, sorted(vars(module)), module.training) for name, module in model.named_modules()]


# The base model stays what it was


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_a_task_and_after_detach_the_base_model_is_what_it_was(
    batch: Batch, implementation: str, tiny_config: TinyConfig
) -> None:
    base = BertForSequenceClassification(tiny_config())
    base.set_attn_implementation(implementation)
    base.bert.encoder.layer[1].eval()
    base.bert.embeddings.requires_grad_(False)
    state = copy.deepcopy(base.state_dict())
    before = attributes(base), [p.requires_grad for p in base.parameters()]
    with torch.no_grad():
        expected = copy.deepcopy(base).eval()(**batch).logits
    model = QTuningModel(base, small_config())
    assert base.config._attn_implementation == implementation
    assert torch.equal(model(**batch).logits, expected)
    learn(model, batch, 4)
    assert not torch.equal(logits(model, batch, "task-3"), expected)
    assert torch.equal(logits(model, batch, None), expected)
    model.set_task("task-1")
    assert model.detach() is base
    assert (attributes(base), [p.requires_grad for p in base.parameters()]) == before
    assert base.config._attn_implementation == implementation
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in state.items())
    with torch.no_grad():
        assert torch.equal(base.eval()(**batch).logits, expected)


def test_a_base_model_with_a_head_lends_its_encoder(
    tiny_bert: BertModel, batch: Batch, tiny_config: TinyConfig
) -> None:
    with_head = BertForSequenceClassification(tiny_config())
    with_head.bert.load_state_dict(tiny_bert.state_dict())
    answers = []
    for base in (tiny_bert, with_head):
        torch.manual_seed(0)
        model = QTuningModel(base, small_config())
        learn(model, batch, 2)
        answers.append(logits(model, batch, "task-1"))
    assert torch.equal(*answers)


def test_without_a_task_labels_and_options_go_to_the_base_model(batch: Batch, tiny_config: TinyConfig) -> None:
    model = QTuningModel(BertForSequenceClassification(tiny_config()), small_config())
    output = model(**batch, labels=LABELS, output_hidden_states=True)
    assert output.loss is not None and len(output.hidden_states) == 4


# Against another implementation


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_equal_those_of_a_peft_prefix(
    batch: Batch, implementation: str, tiny_config: TinyConfig, computed: Any
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


@pytest.mark.parametrize("gate_per", ["layer", "head"])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_finished_task_answers_as_it_did_in_training(
    tiny_bert: BertModel, batch: Batch, gate_per: str, rank: int
) -> None:
    model = QTuningModel(tiny_bert, small_config(gate_per=gate_per, rank=rank))
    for task in range(5):
        model.start_task(f"task-{task}", 2)
        train(model, batch)
        trained = logits(model, batch, f"task-{task}")
        model.finish_task()
        torch.testing.assert_close(logits(model, batch, f"task-{task}"), trained)
        torch.testing.assert_close(logits(model, batch, f"task-{task}", live=True), trained)


def test_prefixes_grow_until_the_queue_is_full_and_then_stay(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 7, steps=1)
    assert [adapter.prefix_rows for adapter in model.adapters.values()] == [5, 8, 11, 11, 11, 11, 11]


def test_older_adapters_never_change(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    before = logits(model, batch, "task-0")
    learn(model, batch, 4)
    assert torch.equal(logits(model, batch, "task-0"), before)
    assert not torch.equal(logits(model, batch, "task-0", live=True), before)


def test_mixed_batches_give_each_sample_its_own_task(tiny_bert: BertModel, batch: Batch) -> None:
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


def test_the_task_set_survives_a_mixed_batch(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 2)
    expected = logits(model, batch, "task-1")
    model(**batch, task_names=["task-0"] * 4)
    assert torch.equal(model(**batch).logits, expected)


def test_only_the_chosen_layers_get_a_prefix(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config(layers=[2, 0]))
    model.start_task("task", 2)
    held = [hasattr(layer.module, "qtuning_prefix") for layer in model.backbone.injector.layers]
    assert held == [True, False, True]
    train(model, batch)


# What trains


def gradients(model: QTuningModel) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_what_trains_and_what_is_frozen(tiny_bert: BertModel, batch: Batch) -> None:
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


def test_a_task_starts_where_no_gradients_are_computed(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    with torch.no_grad():
        model.start_task("first", 2)
    train(model, batch)
    assert model.finish_task().name == "first"


def test_retention_reaches_only_the_shared_prompt_and_the_discriminator(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config(reparameterization=None))
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.train()
    output = model(**batch, labels=LABELS)
    output.retention_loss.backward()
    reached = {name for name, gradient in gradients(model).items() if gradient is not None and gradient.any()}
    assert reached == {name for name, _ in model.named_parameters() if "shared" in name or "discriminator" in name}


def test_retention_targets_may_be_computed_beforehand(tiny_bert: BertModel, batch: Batch) -> None:
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
def test_no_retention_where_there_is_nothing_to_retain(tiny_bert: BertModel, batch: Batch, changes: dict) -> None:
    model = QTuningModel(tiny_bert, small_config(**changes))
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.train()
    assert model(**batch, labels=LABELS).retention_loss is None and model.discriminator is None


def test_a_batch_of_one_skips_retention(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.train()
    one = {name: value[:1] for name, value in batch.items()}
    assert model(**one, labels=LABELS[:1]).retention_loss is None


@pytest.mark.parametrize("gate_training", ["every-task", "first-task"])
def test_gate_training(tiny_bert: BertModel, batch: Batch, gate_training: str) -> None:
    model = QTuningModel(tiny_bert, small_config(gate_training=gate_training))
    alphas = []
    for _ in range(3):
        learn(model, batch, 1)
        alphas.append(model.training_prefix.gates[0].alpha.item())
    assert alphas[0] != 1
    assert (alphas[0] == alphas[1] == alphas[2]) == (gate_training == "first-task")


def test_gradient_checkpointing_gives_the_same_gradients(batch: Batch, tiny_config: TinyConfig) -> None:
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


def test_trainable_parameters_are_in_one_group_each(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config(rank=2))
    learn(model, batch, 3)
    model.start_task("last", 2)
    groups = model.parameter_groups()
    assert all(groups.values()) and set(groups) == {"prompt", "gate", "head", "network"}
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("gate" in names[id(parameter)] for parameter in groups["gate"]) and len(groups["gate"]) == 6


def test_inputs_that_are_not_of_the_batch_stay_as_they_are(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.train()
    one_for_all = torch.arange(10)[None]
    assert model(**batch, labels=LABELS, position_ids=one_for_all).retention_loss is not None


def test_embeddings_instead_of_tokens(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    embedded = {"inputs_embeds": tiny_bert.embeddings.word_embeddings(batch["input_ids"])}
    expected = logits(model, batch, "task-0")
    torch.testing.assert_close(model(**embedded, attention_mask=batch["attention_mask"]).logits, expected)


def test_what_stands_on_the_layers_moves_with_the_model(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    model.to("meta")
    assert model.backbone.injector.layers[0].module.qtuning_prefix["prefix_key"].device.type == "meta"


# Saving


@pytest.mark.parametrize("tasks", [0, 1, 4])
def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened(
    tiny_bert: BertModel, batch: Batch, tmp_path: Any, tasks: int
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


def test_a_save_replaces_the_one_before_and_leaves_nothing_behind(
    tiny_bert: BertModel, batch: Batch, tmp_path: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config())
    for tasks in (1, 2, 3):
        learn(model, batch, 1)
        model.save_pretrained(tmp_path)
        assert len([path for path in tmp_path.iterdir() if path.name != ".lock"]) == tasks + 2  # tasks, state, index


def test_a_save_leaves_what_belongs_to_others_alone(tiny_bert: BertModel, batch: Batch, tmp_path: Any) -> None:
    tiny_bert.save_pretrained(tmp_path)
    model = QTuningModel(tiny_bert, small_config())
    for _ in range(2):
        learn(model, batch, 1)
        model.save_pretrained(tmp_path)
    assert {"model.safetensors", "config.json"} <= {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_saves_at_once_leave_a_whole_one(tiny_bert: BertModel, batch: Batch, tmp_path: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 2)
    saved = []
    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(model.save_pretrained, tmp_path) for _ in range(20)]:
            saved.append(done.result())
    assert len(saved) == 20 and list(read_checkpoint(tmp_path).adapters) == ["task-0", "task-1"]


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"config": {"rank": 3}},
        {"base_model": "x"},
        {"tasks": None},
        {"tasks": ["x"]},
        {"tasks": [{"name": 5, "label_names": ["a", "b"]}]},
        {"state": {"file": 3, "sha256": ""}},
        {"state": {"file": "../state", "sha256": ""}},
        {"format_version": 1},
        {"config": {"colour": "red"}},
    ],
)
def test_an_index_that_was_tampered_with_is_refused(
    tiny_bert: BertModel, batch: Batch, tmp_path: Any, change: dict
) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 2)
    model.save_pretrained(tmp_path)
    index = read_json(tmp_path / "adapter_config.json")
    write_json(tmp_path / "adapter_config.json", index | change)
    base = model.detach()
    with pytest.raises(ValueError, match=r"adapter_config|does not fit|damaged|missing|index|colour"):
        QTuningModel.from_pretrained(base, tmp_path)
    assert all(parameter.requires_grad for parameter in base.parameters())
    QTuningModel(base, small_config())


def test_another_base_model_is_refused(tiny_bert: BertModel, batch: Batch, tmp_path: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(model.detach())
    with torch.no_grad():
        other.encoder.layer[2].output.dense.weight.mul_(1.01)
    before = attributes(other)
    with pytest.raises(ValueError, match="another base model"):
        QTuningModel.from_pretrained(other, tmp_path)
    assert attributes(other) == before
    assert QTuningModel.from_pretrained(tiny_bert.bfloat16(), tmp_path).tasks == ["task-0"]  # only rounded: the same


def test_saving_amid_a_task_is_refused(tiny_bert: BertModel, tmp_path: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    model.start_task("task", 2)
    with pytest.raises(RuntimeError, match="'task' is in training"):
        model.save_pretrained(tmp_path)


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
    tiny_bert: BertModel, batch: Batch, call: Any, error: type[Exception], named: str
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


def test_a_detached_model_takes_no_task(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    model.detach()
    for call in (lambda: model.set_task("task-0"), lambda: model.start_task("new", 2)):
        with pytest.raises(RuntimeError, match="detach"):
            call()


def test_a_model_that_is_attached_to_is_refused_until_it_is_detached(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 1)
    with pytest.raises(ValueError, match="attached already"):
        QTuningModel(tiny_bert, small_config())
    assert model(**batch).logits.isfinite().all()
    QTuningModel(model.detach(), small_config()).detach()


def test_an_implementation_chosen_in_between_is_kept(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    tiny_bert.set_attn_implementation("eager")
    learn(model, batch, 1)
    assert model.detach().config._attn_implementation == "eager"


def test_two_tasks_at_once_are_refused(tiny_bert: BertModel) -> None:
    model = QTuningModel(tiny_bert, small_config())
    model.start_task("first", 2)
    with pytest.raises(RuntimeError, match="'first' is in training"):
        model.start_task("second", 2)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"layers": [3]}, ValueError, "layers.*layer 3.*0 to 2"),
        ({"task_type": "causal-lm"}, ValueError, "task_type='causal-lm' needs a decoder"),
        ({"task_type": "text-to-text"}, ValueError, "task_type='text-to-text' needs an encoder-decoder"),
        ({"task_type": "image-classification"}, ValueError, "needs a model that reads images"),
        ({"prompt_length": 40}, ValueError, "queue_size.*prompt_length"),
    ],
)
def test_configs_that_do_not_fit(tiny_bert: BertModel, changes: dict, error: type[Exception], named: str) -> None:
    before = attributes(tiny_bert)
    with pytest.raises(error, match=named):
        QTuningModel(tiny_bert, small_config(**changes))
    assert attributes(tiny_bert) == before and all(p.requires_grad for p in tiny_bert.parameters())


def test_mixed_batches_under_autocast(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 2)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch, task_names=["task-0", "task-1"] * 2).logits
    torch.testing.assert_close(mixed[1], logits(model, batch, "task-1")[1], atol=0.05, rtol=0.05)


def test_it_trains_in_another_precision_too(tiny_bert: BertModel, batch: Batch) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 3)
    model.start_task("last", 2)
    model.to(torch.bfloat16)
    train(model, batch)
    assert model.finish_task().prefix_rows == 11


# With others


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_trains_it_with_its_defaults(
    tiny_bert: BertModel, batch: Batch, tmp_path: Any, checkpointing: bool
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
def test_on_a_gpu_it_learns_moves_saves_and_goes_on(tiny_bert: BertModel, batch: Batch, tmp_path: Any) -> None:
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
