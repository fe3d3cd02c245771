"""Trainer, collators, pipelines and accelerate get from a model with a task set what they get from its base model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    LayoutLMConfig,
    LayoutLMModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.trainer_utils import get_last_checkpoint

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1}
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
ONE_OF_EACH = ["BERT", "ViT", "T5", "Llama"]

Rows = list[dict[str, Any]]


def started(family: Any, **changes: Any) -> QTuningModel:
    torch.manual_seed(0)
    settings = SMALL | {"task_type": family.task_type, "retention_weight": 0.0} | changes
    model = QTuningModel(family.base_model(), QTuningConfig(**settings))
    model.start_task("reviews", 3)
    return model


def rows_of(family: Any, size: int = 8) -> Rows:
    """Examples with labels: classes, or for language modelling token ids, −100 for padding."""
    batch = family.batch(size=size)
    if family.kind == "decoder":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    else:
        batch["labels"] = batch.pop("decoder_input_ids", torch.arange(size) % 3)
    if batch["labels"].ndim == 2:  # rows that count unequally many labels
        batch["labels"][: size // 2, -2:] = -100
    return [{name: value[i] for name, value in batch.items()} for i in range(size)]


def trainer(model: Any, rows: Rows, folder: Path, **options: Any) -> Trainer:
    known = {"args", "compute_metrics", "data_collator", "callbacks"}
    others = {name: options.pop(name) for name in known & options.keys()}
    arguments = TrainingArguments(str(folder), **(QUIET | {"save_strategy": "no", "max_steps": 1} | options))
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, **others)


def trained(model: QTuningModel) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert mine.keys() == theirs.keys()
    for name, each in mine.items():
        torch.testing.assert_close(
            each, theirs[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# Saving


def test_a_checkpoint_holds_what_trains_and_a_run_goes_on_from_it(family: Any, tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    options["per_device_train_batch_size"] = 4
    model = started(family)
    trainer(model, rows_of(family), tmp_path, **options).train()
    first = tmp_path / "checkpoint-1"
    saved = load_file(first / "model.safetensors")
    ours = {name for name, _ in model.named_parameters() if not name.startswith("base_model.")}
    assert saved.keys() == ours | {"learning._extra_state"}
    again = started(family)
    trainer(again, rows_of(family), tmp_path, **options).train(resume_from_checkpoint=str(first))
    assert_same(trained(again), trained(model))


def test_the_best_state_is_loaded_at_the_end(families: Any, tmp_path: Path) -> None:
    family = families["Llama"]
    scores = iter([1.0, 3.0, 2.0])
    states = []

    def metric(prediction: Any) -> dict[str, float]:
        states.append(trained(model))
        return {"score": next(scores)}

    model = started(family)
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "learning_rate": 1e-2}
    trainer(model, rows_of(family), tmp_path, compute_metrics=metric, **options).train()
    assert_same(trained(model), states[1])
    assert get_last_checkpoint(str(tmp_path)) is not None


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "T5"])
def test_accelerate_saves_and_restores_a_state(families: Any, name: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = started(families[name])
    prepared = accelerator.prepare(model)
    before = trained(model)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(prepared, str(tmp_path / "model"))
    with torch.no_grad():
        for parameter in model.learning.parameters():
            parameter.add_(1.0)
    accelerator.load_state(str(tmp_path / "state"))
    assert_same(trained(model), before)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert_same({each: saved[each] for each in saved if each != "learning._extra_state"}, before)


# Evaluating


def test_metrics_see_the_logits_of_forward(family: Any, tmp_path: Path) -> None:
    model, rows = started(family), rows_of(family, 4)
    seen: list[Any] = []

    def metric(prediction: Any) -> dict[str, float]:
        predictions = prediction.predictions
        seen.append(torch.tensor(predictions[0] if isinstance(predictions, tuple) else predictions))
        return {"seen": 1.0}

    trainer(model, rows, tmp_path, compute_metrics=metric, per_device_eval_batch_size=2).evaluate()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["T5", "mT5", "BART"])
def test_predict_with_generate_writes_what_generate_writes(families: Any, name: str, tmp_path: Path) -> None:
    model, rows = started(families[name]), rows_of(families[name], 4)
    arguments = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, generation_max_length=6, **QUIET)
    found = Seq2SeqTrainer(model=model, args=arguments).predict(rows).predictions
    inputs = {each: torch.stack([row[each] for row in rows]) for each in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, max_length=6)
    written = torch.tensor(found)
    padded = F.pad(expected, (0, written.shape[1] - expected.shape[1]), value=model.config.pad_token_id)
    assert torch.equal(written.where(written != -100, model.config.pad_token_id), padded)


# Losses


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_label_smoothing(families: Any, name: str, tmp_path: Path) -> None:
    family, epsilon = families[name], 0.2
    model, rows = started(family), rows_of(family, 4)
    collator = None
    if family.kind == "encoder-decoder":
        collator = with_decoder_inputs(model)
    run = trainer(
        model, rows, tmp_path, label_smoothing_factor=epsilon, per_device_train_batch_size=4, data_collator=collator
    )
    run.train()
    found = run.state.log_history[0]["loss"]

    again = started(family).train()  # the loss of the first step, by PyTorch's own label smoothing
    batch = {each: torch.stack([row[each] for row in rows]) for each in rows[0]}
    logits, labels = again(**batch).logits, batch["labels"]
    if family.kind == "decoder":
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=epsilon)
    assert found == pytest.approx(float(expected.detach()), abs=1e-3)
    plain = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
    assert abs(plain - expected) > 5e-3


def with_decoder_inputs(model: Any) -> Callable[[Rows], dict[str, Tensor]]:
    """What DataCollatorForSeq2Seq does for the model's decoder, without a tokenizer."""

    def collate(rows: Rows) -> dict[str, Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return batch

    return collate


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradient_accumulation_is_exact(families: Any, name: str, tmp_path: Path) -> None:
    """Rows with unequally many labels: the mean over a step is not the mean of its batches' means."""
    family, ends, losses = families[name], [], []
    for batch_size, steps in ((4, 1), (1, 4)):
        model = started(family)
        run = trainer(
            model,
            rows_of(family, 4),
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0.0,
        )
        run.train()
        losses.append(run.state.log_history[0]["loss"])
        ends.append(trained(model))
    assert not torch.equal(*(next(iter(each.values())) for each in (ends[0], trained(started(family)))))
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert_same(ends[1], ends[0], tolerance=2e-5)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.2}, {"gradient_accumulation_steps": 4}], ids=str)
def test_labels_of_a_head_are_not_shifted_where_the_base_is_a_causal_language_model(
    families: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    family = families["Llama"]
    model = started(family, task_type="sequence-classification")
    assert type(model.base_model).__name__ == "LlamaForCausalLM" and model._get_name() == "QTuningModel"
    rows = [row | {"labels": index % 3} for index, row in enumerate(rows_of(family, 4))]
    size = 4 // options.get("gradient_accumulation_steps", 1)
    run = trainer(model, rows, tmp_path, per_device_train_batch_size=size, max_grad_norm=0.0, **options)
    run.train()
    again = started(family, task_type="sequence-classification").train()
    batch = {each: torch.stack([row[each] for row in rows]) for each in ("input_ids", "attention_mask")}
    labels = torch.tensor([row["labels"] for row in rows])
    smoothing = options.get("label_smoothing_factor", 0.0)
    expected = F.cross_entropy(again(**batch).logits, labels, label_smoothing=smoothing)
    assert run.state.log_history[0]["loss"] == pytest.approx(float(expected.detach()), abs=1e-3)


def test_the_share_of_memory_retention_is_that_of_the_labels(families: Any) -> None:
    for name in ("BERT", "Llama"):
        family = families[name]
        model = started(family, retention_weight=0.5)
        for task in ("second", "third"):
            model.finish_task()
            model.start_task(task, 3)
        rows = rows_of(family, 4)[1:]  # without the one with padding, behind which a decoder predicts one token less
        batch = {each: torch.stack([row[each] for row in rows]) for each in rows[0]}
        labels = batch["labels"]
        items = int((labels[..., 1:] if family.kind == "decoder" else labels).ne(-100).sum())
        torch.manual_seed(5)
        alone = model.train()(**batch)
        torch.manual_seed(5)
        third = model(**batch, num_items_in_batch=3 * items)
        torch.testing.assert_close(third.loss, alone.loss / 3, atol=1e-5, rtol=1e-5)
        with pytest.warns(UserWarning, match="memory retention is left out.*no labels"):
            model(**{each: value for each, value in batch.items() if each != "labels"})
        with pytest.warns(UserWarning, match="memory retention is left out.*batch of one"):
            model(**{each: value[:1] for each, value in batch.items()})


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])  # T5's own encoder never calls the module with the hook
def test_neftune_adds_its_noise_in_training_alone(families: Any, name: str, tmp_path: Path) -> None:
    family, seen = families[name], []
    model = started(family)
    words = model.get_input_embeddings()
    run = trainer(model, rows_of(family, 8), tmp_path, neftune_noise_alpha=5.0, remove_unused_columns=False)

    def watch(module: Any, args: Any, output: Tensor) -> None:
        if output.shape[1] == 7:  # what the encoder or the decoder alone reads
            seen.append((output - words.weight[args[0]]).detach())

    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:  # the watcher comes after NEFTune's hook
        handle = words.register_forward_hook(watch)
        try:
            return forward(*args, **kwargs)
        finally:
            handle.remove()

    model.forward = watched
    run.train()
    noise = torch.stack(seen)
    bound = 5.0 / (7 * noise.shape[-1]) ** 0.5
    assert 0.9 * bound < float(noise.abs().max()) <= bound * 1.001
    assert not words.training or not words._forward_hooks
    seen.clear()
    run.evaluate()
    assert all(not each.any() for each in seen)


# What a dataset's columns and collators are asked for


def test_trainer_keeps_the_columns_that_the_base_model_takes(family: Any) -> None:
    model = started(family)
    inner = model.backbone.encoder if model.has_heads else model.base_model
    theirs = inspect.signature(inner.forward).parameters
    ours = inspect.signature(model.forward).parameters
    named = [name for name, each in theirs.items() if each.kind is not each.VAR_KEYWORD]
    assert list(ours)[: len(named)] == named
    assert {"labels", "task_names"} <= ours.keys()


def test_inputs_by_position_mean_what_they_mean_to_the_base_model(family: Any) -> None:
    model = started(family).eval()
    inputs, base = family.batch(), inspect.signature(model.base_model.forward).parameters
    if "input_ids" in inputs and "position_ids" in base:
        inputs["position_ids"] = torch.arange(7).flip(0).expand(3, -1) + 2
    names = [name for name in inspect.signature(model.forward).parameters if name != "self"]
    by_position = [inputs.get(name) for name in names[: 1 + max(names.index(name) for name in inputs)]]
    with torch.no_grad():
        assert torch.equal(model(*by_position).logits, model(**inputs).logits)


def test_boxes_reach_layoutlm(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    base = LayoutLMModel(LayoutLMConfig(vocab_size=40, **sizes))
    model = QTuningModel(base, QTuningConfig(**SMALL))
    model.start_task("forms", 2)
    boxes = torch.randint(0, 400, (4, 5, 4)).sort(-1).values
    columns = {"input_ids": torch.randint(5, 40, (4, 5)).tolist(), "bbox": boxes.tolist(), "labels": [0, 1, 0, 1]}
    dataset = datasets.Dataset.from_dict(columns | {"file": ["a", "b", "c", "d"]})
    seen = []
    base.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs.get("bbox")), with_kwargs=True)
    trainer(model, dataset, tmp_path, per_device_train_batch_size=4).train()
    assert {tuple(box.flatten().tolist()) for box in seen[-1]} == {tuple(box.flatten().tolist()) for box in boxes}


@pytest.mark.parametrize("name", ["T5", "BART", "Llama", "BERT"])
def test_the_collator_for_seq2seq_asks_the_base_model(families: Any, name: str, tokenizer: Any) -> None:
    model = started(families[name])
    rows = [{"input_ids": [7, 8], "labels": [9, 10, 3]}, {"input_ids": [7, 8, 9], "labels": [11, 3]}]
    found = DataCollatorForSeq2Seq(tokenizer, model=model)(rows)
    expected = DataCollatorForSeq2Seq(tokenizer, model=model.base_model)(rows)
    assert found.keys() == expected.keys()
    assert ("decoder_input_ids" in found) == (families[name].kind == "encoder-decoder")
    assert all(torch.equal(found[each], expected[each]) for each in found)


# Pipelines


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizers = pytest.importorskip("tokenizers")
    names = ["[UNK]", "[PAD]", "[BOS]", "[EOS]", *(f"w{i}" for i in range(4, 40))]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {f"{each.lower()}_token": f"[{each}]" for each in ("UNK", "PAD", "BOS", "EOS")}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


def test_a_pipeline_generates_under_the_task(families: Any, tokenizer: Any) -> None:
    model = started(families["Llama"])
    model.finish_task()
    writes = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts, options = ["w7 w8", "w9 w10 w11 w12"], {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    found = [each[0]["generated_text"] for each in writes(texts, batch_size=2, **options)]
    for text, answer in zip(texts, found):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert answer.split() == tokenizer.decode(expected, skip_special_tokens=True).split()
    model.set_task(None)
    assert [each[0]["generated_text"] for each in writes(texts, batch_size=2, **options)] != found


def test_a_pipeline_classifies_with_the_tasks_own_classes(families: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = QTuningModel(families["BERT"].base_model(), QTuningConfig(**SMALL))
    base_labels = dict(model.base_model.config.id2label)
    for name, classes in (("topic", ["news", "sport"]), ("mood", ["bad", "fair", "good"])):
        model.start_task(name, label_names=classes)
        model.finish_task()
    classifies = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    for name in ("topic", "mood", "topic"):
        model.set_task(name)
        found = classifies("w7 w8 w9", top_k=None)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[7, 8, 9]])).logits[0]
        expected = dict(zip(model.label_names(name), logits.softmax(-1).tolist()))
        assert {each["label"]: pytest.approx(each["score"], abs=1e-5) for each in found} == expected
    assert model.base_model.config.id2label == base_labels
    assert model.config is model.config and model.config is not model.base_model.config
    model.set_task(None)
    assert model.config is model.base_model.config


# As a PreTrainedModel


def test_it_has_the_base_models_own(family: Any) -> None:
    model = started(family)
    base = model.base_model
    assert model.loss_type == (None if model.has_heads else base.loss_type)
    for name in ("dtype", "main_input_name", "generation_config"):
        assert getattr(model, name, "none") == getattr(base, name, "none")
    assert model.can_generate() == base.can_generate()
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert hasattr(model, "prepare_decoder_input_ids_from_labels") == hasattr(
        base, "prepare_decoder_input_ids_from_labels"
    )
    assert repr(model).startswith("QTuningModel(")
    assert model.num_parameters() == base.num_parameters() + sum(p.numel() for p in model.learning.parameters())
    assert model.num_parameters(only_trainable=True) == sum(each.numel() for each in trained(model).values())
    if base.can_generate():
        config = type(base.generation_config)(max_length=5)
        model.generation_config = config
        assert base.generation_config is config


def test_a_causal_model_is_known_by_the_name_of_its_base(families: Any) -> None:
    assert started(families["Llama"])._get_name() == "LlamaForCausalLM"
    assert started(families["BERT"])._get_name() == "QTuningModel"


def test_checkpointing_is_switched_by_its_new_name_too(families: Any) -> None:
    model = started(families["BERT"]).train()
    if not hasattr(model.base_model, "activation_checkpointing_enable"):
        pytest.skip("transformers before 5.24 has one name")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing and model.backbone.injector.checkpoints
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing and not model.backbone.injector.checkpoints
