"""Training with what people train with: checkpoints, torch.compile, autocast, transformers.Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1}
PLACEMENTS = ["prefix", "input"]


def in_training(family: Any, **changes: Any) -> QTuningModel:
    """A model in its third task, so that an eviction has been and memory retention is due."""
    torch.manual_seed(0)
    base = family.base_model()
    model = QTuningModel(base, QTuningConfig(**(SMALL | {"task_type": family.task_type} | changes)))
    for task in ("first", "second", "third"):
        model.start_task(task, 3)
        if task != "third":
            model.finish_task()
    return model.train()


def labelled(family: Any, size: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A batch with labels: classes, or for language modelling token ids."""
    inputs = family.batch(seed, size)
    if family.kind == "decoder":
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    else:
        labels = inputs.pop("decoder_input_ids", torch.arange(size) % 3)
    return inputs | {"labels": labels}


def step(model: QTuningModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(5)  # the shift of memory retention
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_checkpoints_of_either_kind_give_the_same_gradients(family: Any, placement: str, reentrant: bool) -> None:
    model, batch = in_training(family, placement=placement), labelled(family)
    loss, gradients = step(model, batch)
    assert all(gradient is not None for gradient in gradients.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed_loss, checkpointed = step(model, batch)
    torch.testing.assert_close(checkpointed_loss, loss, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            checkpointed[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    model.gradient_checkpointing_disable()
    assert torch.equal(step(model, batch)[0], loss)


def test_checkpointing_layers_drop_nothing_where_no_gradient_is_asked_for(family: Any) -> None:
    model, inputs = in_training(family), family.batch()
    inputs.pop("decoder_input_ids", None)
    with torch.no_grad():
        expected = model.features(inputs, task="first")
        model.gradient_checkpointing_enable()
        torch.testing.assert_close(model.features(inputs, task="first"), expected, atol=1e-5, rtol=1e-5)
    assert model.backbone.injector.checkpoints


def test_two_forward_passes_may_come_before_a_backward(family: Any) -> None:
    model, batch = in_training(family, retention_weight=0.0), labelled(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, alone = step(model, batch)
    loss = model(**batch).loss
    model.features(family.batch(1), task="first")
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, alone[name], msg=lambda m, n=name: f"{n}: {m}")


# transformers.Trainer


def losses(family: Any, folder: Any, **options: Any) -> Tensor:
    """The loss of each of four steps of a Trainer run."""
    model = in_training(family, retention_weight=0.0)
    rows = labelled(family, size=16)
    dataset = [{name: value[i] for name, value in rows.items()} for i in range(16)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


FOUR_KINDS = ["BERT", "ViT", "T5", "Llama"]
thorough = pytest.mark.thorough
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}  # takes long, so only with one


def once(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if name == "BERT" else (thorough,)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        *(pytest.param(name, {"gradient_checkpointing": True}, 1e-4, marks=once(name)) for name in FOUR_KINDS),
        *(pytest.param(name, {"bf16": True}, 2e-2, marks=once(name)) for name in FOUR_KINDS),
        ("BERT", COMPILED, 1e-4),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_a_trainer_run_has_the_losses_of_the_plain_one(
    families: Any, tmp_path: Any, name: str, options: dict[str, Any], tolerance: float
) -> None:
    plain = losses(families[name], tmp_path)
    assert len(plain) == 4 and len(set(plain.tolist())) == 4
    torch.testing.assert_close(losses(families[name], tmp_path, **options), plain, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("BERT", "prefix"),
        *(pytest.param(*each, marks=thorough) for each in (("BERT", "input"), ("Llama", "input"), ("T5", "prefix"))),
    ],
)
def test_a_training_step_compiles_into_one_graph(families: Any, name: str, placement: str) -> None:
    family = families[name]
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = in_training(family, placement=placement, retention_weight=0.0)
        batch = labelled(family)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for _ in range(3):
            optimizer.zero_grad()
            loss = call(**batch).loss
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(torch.stack(found[3:]), torch.stack(found[:3]), atol=1e-5, rtol=1e-5)


def test_prefixes_in_a_decoder_alone_retain_nothing(families: Any) -> None:
    """Features are those of the encoder, which such prefixes do not reach."""
    model = in_training(families["T5"], stack="decoder")
    assert not model.retains_memory and in_training(families["T5"], stack="both").retains_memory
    assert "retention_loss" not in model(**labelled(families["T5"]))
