"""Labels in every family of models: a task's problem type decides what they mean, while it trains and afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.method.labels import MULTI, PROBLEM_TYPES, REGRESSION, SINGLE

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1}
OUTPUTS = {SINGLE: 3, MULTI: 3, REGRESSION: 1}
LABELS = {
    SINGLE: torch.tensor([0, 2, 1]),
    MULTI: torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]]),
    REGRESSION: torch.tensor([0.5, -1, 3]),
}


def headed(family: Any, **changes: Any) -> QTuningModel:
    """A model with heads, also on the families that write."""
    task_type = "image-classification" if family.kind == "image" else "sequence-classification"
    torch.manual_seed(0)
    return QTuningModel(family.base_model(), QTuningConfig(**(SMALL | {"task_type": task_type} | changes)))


def inputs_of(family: Any) -> dict[str, Tensor]:
    inputs = family.batch()
    inputs.pop("decoder_input_ids", None)
    return inputs


def by_definition(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    if problem_type == SINGLE:
        return F.cross_entropy(logits, labels)
    if problem_type == MULTI:
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.mse_loss(logits.squeeze(1), labels)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_the_loss_is_that_of_the_tasks_problem_type(family: Any, problem_type: str) -> None:
    model, inputs = headed(family, retention_weight=0.5), inputs_of(family)
    for task in ("first", "second", "third"):
        model.start_task(task, OUTPUTS[problem_type], problem_type=problem_type)
        if task != "third":
            model.finish_task()
    output = model.train()(**inputs, labels=LABELS[problem_type])
    expected = by_definition(output.logits, LABELS[problem_type], problem_type)
    assert output.retention_loss is not None
    torch.testing.assert_close(output.loss, expected + 0.5 * output.retention_loss)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.eval().set_task("first")
    output = model(**inputs, labels=LABELS[problem_type])
    torch.testing.assert_close(output.loss, by_definition(output.logits, LABELS[problem_type], problem_type))


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_two_halves_have_the_gradient_of_the_whole(family: Any, problem_type: str) -> None:
    """With the number of items of the whole batch, losses of its parts add up, memory retention's share included."""
    model, inputs, labels = headed(family), inputs_of(family), LABELS[problem_type]
    model.start_task("task", OUTPUTS[problem_type], problem_type=problem_type)
    model.train()
    model(**inputs, labels=labels).loss.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = [parameter.grad.clone() for parameter in parameters]
    model.zero_grad()
    for part in (slice(0, 1), slice(1, 3)):
        rows = {name: x[part] for name, x in inputs.items()}
        model(**rows, labels=labels[part], num_items_in_batch=torch.tensor(labels.numel())).loss.backward()
    for parameter, gradient in zip(parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)


def test_memory_retention_counts_by_the_share_of_items(families: Any) -> None:
    for name in ("BERT", "T5", "Llama"):
        family = families[name]
        torch.manual_seed(0)
        model = QTuningModel(family.base_model(), QTuningConfig(**SMALL, task_type=family.task_type))
        for task in ("first", "second", "third"):
            model.start_task(task, 3)
            if task != "third":
                model.finish_task()
        inputs, labels = inputs_of(family), LABELS[SINGLE]
        items = 3
        if not model.has_heads:
            labels = torch.full((3, inputs["input_ids"].shape[1]), -100)
            labels[:, 0] = 7
            labels[1, 2:5] = 8
            items = 3 if family.kind == "decoder" else 6  # a decoder predicts no first token
        losses = []
        for num_items in ({}, {"num_items_in_batch": 4 * items}):
            torch.manual_seed(1)  # memory retention pairs samples at random
            losses.append(model.train()(**inputs, labels=labels, **num_items).loss)
        torch.testing.assert_close(losses[1], losses[0] / 4)


def test_labels_of_a_finished_task_are_checked_after_a_reload(families: Any, tmp_path: Path) -> None:
    family = families["BERT"]
    model = headed(family)
    for problem_type in PROBLEM_TYPES:
        model.start_task(problem_type, OUTPUTS[problem_type], problem_type=problem_type)
        model.finish_task()
    model.save_pretrained(tmp_path)
    for lazy in (False, True):
        loaded = QTuningModel.from_pretrained(family.base_model(), tmp_path, lazy=lazy)
        for problem_type in PROBLEM_TYPES:
            assert loaded.problem_type(problem_type) == problem_type
            loaded.set_task(problem_type)
            output = loaded(**inputs_of(family), labels=LABELS[problem_type])
            torch.testing.assert_close(output.loss, by_definition(output.logits, LABELS[problem_type], problem_type))
            other = LABELS[MULTI if problem_type != MULTI else SINGLE]
            with pytest.raises((TypeError, ValueError), match=f"task '{problem_type}' has"):
                loaded(**inputs_of(family), labels=other)
    other = headed(family)
    other.load_task(tmp_path, REGRESSION)
    assert other.problem_type(REGRESSION) == REGRESSION and other.label_names(REGRESSION) == ("0",)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_a_mixed_batch_of_one_problem_type_has_its_loss(family: Any, problem_type: str) -> None:
    model, inputs = headed(family), inputs_of(family)
    for name, more in (("few", 0), ("many", 1)):
        model.start_task(name, OUTPUTS[problem_type] + more, problem_type=problem_type)
        model.finish_task()
    names = ["few", "many", "few"]
    labels = LABELS[problem_type]
    if problem_type != SINGLE:
        labels = F.pad(labels.reshape(3, -1), (0, 1), value=0.0)
    output = model(**inputs, labels=labels, task_names=names)
    losses, entries = [], []
    for row, name in enumerate(names):
        size = OUTPUTS[problem_type] + (name == "many")
        own = labels[[row]] if problem_type == SINGLE else labels[[row], :size]
        losses.append(by_definition(output.logits[[row], :size], own.squeeze(0) if size == 1 else own, problem_type))
        entries.append(1 if problem_type == SINGLE else size)
    expected = sum(loss * count for loss, count in zip(losses, entries)) / sum(entries)
    torch.testing.assert_close(output.loss, expected)


def test_a_mixed_batch_of_several_problem_types_has_logits_but_no_loss(families: Any) -> None:
    family = families["BERT"]
    model, inputs = headed(family), inputs_of(family)
    for problem_type in PROBLEM_TYPES:
        model.start_task(problem_type, OUTPUTS[problem_type], problem_type=problem_type)
        model.finish_task()
    names = [SINGLE, REGRESSION, MULTI]
    logits = model(**inputs, task_names=names).logits
    for row, name in enumerate(names):
        model.set_task(name)
        expected = model(**inputs).logits[row]
        torch.testing.assert_close(logits[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=f"'{SINGLE}' has problem_type.*'{REGRESSION}' has"):
        model(**inputs, labels=LABELS[SINGLE], task_names=names)


def test_a_language_models_labels_are_checked(writer: Any) -> None:
    torch.manual_seed(0)
    model = QTuningModel(writer.base_model(), QTuningConfig(**SMALL, task_type=writer.task_type))
    model.start_task("task")
    model.train()
    inputs, labels = inputs_of(writer), writer.batch()["input_ids"]
    expected = model(**inputs, labels=labels).loss
    assert torch.equal(model(**inputs, labels=labels.int()).loss, expected)
    for wrong, error, message in (
        (labels + 100, ValueError, "this model has 40 tokens"),
        (torch.full_like(labels, -1), ValueError, "holds -1"),
        (labels > 0, TypeError, "bool"),
        (labels.float(), TypeError, "float32"),
        (torch.tensor([0, 1, 2]), ValueError, r"shape \[3\]"),
    ):
        with pytest.raises(error, match=message):
            model(**inputs, labels=wrong)
    loss = model(**inputs, labels=torch.full_like(labels, -100)).loss
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad and p.grad is not None)


def test_problem_types_are_of_heads_only(families: Any) -> None:
    model = QTuningModel(families["Llama"].base_model(), QTuningConfig(**SMALL, task_type="causal-lm"))
    with pytest.raises(ValueError, match="task_type='causal-lm' has no heads"):
        model.start_task("task", problem_type=REGRESSION)
    with pytest.raises(ValueError, match="problem_type is 'ranking'"):
        model.start_task("task", problem_type="ranking")
    assert model.active_task is None


@pytest.mark.parametrize("problem_type", [MULTI, REGRESSION])
def test_a_trainer_learns_what_labels_mean(families: Any, tmp_path: Path, problem_type: str) -> None:
    family = families["BERT"]
    model, inputs = headed(family), inputs_of(family)
    rows = [{name: x[i] for name, x in inputs.items()} | {"labels": LABELS[problem_type][i]} for i in range(3)]
    model.start_task("task", OUTPUTS[problem_type], problem_type=problem_type)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=3,
        learning_rate=5e-2,
        logging_steps=60,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.finish_task()
    logits = model(**inputs).logits
    if problem_type == MULTI:
        assert torch.equal((logits > 0).float(), LABELS[MULTI])
    else:
        torch.testing.assert_close(logits[:, 0], LABELS[REGRESSION], atol=0.3, rtol=0)


@pytest.mark.parametrize("problem_type", [MULTI, REGRESSION])
def test_every_problem_type_compiles_into_one_graph(families: Any, problem_type: str) -> None:
    family = families["BERT"]
    model, inputs, labels = headed(family, retention_weight=0.0), inputs_of(family), LABELS[problem_type]
    model.start_task("task", OUTPUTS[problem_type], problem_type=problem_type)
    model.train()
    expected = model(**inputs, labels=labels).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, labels=labels).loss, expected)
