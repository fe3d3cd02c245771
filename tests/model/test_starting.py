"""Where a task starts: what is considered, what is chosen, and that nothing has changed where it is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.method.closed_form import closed_form_head
from qtuning_fast.method.labels import MULTI, REGRESSION
from qtuning_fast.model.starting import NEAREST, ChosenStart

Batch = dict[str, Tensor]
SMALL: dict[str, Any] = {"prompt_length": 2, "queue_size": 3, "shared_length": 1, "retention_weight": 0}


def texts(n: int, seed: int = 0) -> Batch:
    """Texts of two classes: one has more words from the first half of the vocabulary than the other."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    words = torch.randint(1, 20, (n, 8), generator=generator) + 10 * labels[:, None]
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels}


def model_of(base: BertModel, **changes: Any) -> QTuningModel:
    torch.manual_seed(0)
    return QTuningModel(base, QTuningConfig(**(SMALL | changes)))


def finish(model: QTuningModel, name: str, seed: int = 0, label_names: Any = ("no", "yes"), **start: Any) -> None:
    torch.manual_seed(seed)
    model.start_task(name, label_names=label_names, **start)
    with torch.no_grad():
        for rows in model.training_prefix.rows:
            rows.prompt.add_(torch.randn_like(rows.prompt))
    model.finish_task()
    model.record_statistics(name, [texts(12, seed)] if len(label_names) == 2 else [_three(seed)])


def _three(seed: int) -> Batch:
    return texts(12, seed) | {"labels": torch.arange(12) % 3}


def sources(found: ChosenStart) -> list[tuple[str, str | None]]:
    return list(dict.fromkeys((each.rows, each.donor) for each in found.considered))


def state(model: QTuningModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.learning.state_dict().items()}


def test_without_examples_a_task_starts_at_random_as_it_always_did(tiny_bert: BertModel) -> None:
    states = []
    for start in ({}, {"start_from": "random"}):
        model = model_of(tiny_bert)
        finish(model, "first")
        torch.manual_seed(1)
        found = model.start_task("next", 2, **start)
        assert (found.chosen.rows, found.chosen.head, found.chosen.loss) == ("random", "random", None)
        states.append(state(model))
        model.detach()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_a_named_task_or_the_previous_one_gives_the_rows_that_it_trained(tiny_bert: BertModel, placement: str) -> None:
    model = model_of(tiny_bert, placement=placement)
    for number in range(4):
        finish(model, f"task-{number}", number)
    for start_from, donor in (("task-1", "task-1"), ("previous", "task-3")):
        found = model.start_task("next", 2, start_from=start_from)
        assert (found.chosen.rows, found.chosen.donor, found.chosen.head) == ("prompt", donor, "random")
        wanted = model.training_prefix.own_prompts(model.adapters[donor])
        assert all(torch.equal(a, b) for a, b in zip(model.training_prefix.prompts(), wanted))
        model.finish_task()
        model.set_task(None)
        model.remove_task("next")
        model.learning.last_learned = "task-3"
        for rows, values in zip(model.training_prefix.rows, wanted if donor == "task-3" else ()):
            rows.prompt.data.copy_(values)
        if donor == "task-1":  # what was learned last is the prompt in the training prefix
            model.training_prefix.start_prompts(model.training_prefix.own_prompts(model.adapters["task-3"]))


def test_before_any_task_the_previous_one_is_random_rows(tiny_bert: BertModel) -> None:
    assert model_of(tiny_bert).start_task("first", 2, start_from="previous").chosen.rows == "random"


def test_with_examples_a_head_starts_in_closed_form(tiny_bert: BertModel) -> None:
    model = model_of(tiny_bert)
    examples, held_out = texts(16), texts(16, 1)
    found = model.start_task("first", 2, examples=[examples], validation=[held_out])
    assert (found.chosen.rows, found.chosen.head, found.chosen.mixed_with) == ("random", "closed-form", ())
    inputs = {name: x for name, x in examples.items() if name != "labels"}
    wanted = closed_form_head(model.features(inputs, task="first"), examples["labels"], 2)
    assert model.head is not None
    factor = float(model.head.weight.norm() / wanted.weight.norm())
    torch.testing.assert_close(model.head.weight.double(), wanted.weight * factor, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        loss = model(**held_out).loss
    assert found.chosen.loss is not None and loss < math.log(2)  # it was never trained


def test_the_start_is_the_one_with_the_least_loss_and_is_what_the_task_computes_with(tiny_bert: BertModel) -> None:
    model = model_of(tiny_bert)
    for number in range(4):
        finish(model, f"task-{number}", number, examples=[texts(12, number)])
    examples = texts(20, 9)
    found = model.start_task("next", label_names=["yes", "no"], start_from="validation", examples=[examples])
    losses = [each.loss for each in found.considered if each.loss is not None]
    assert found.chosen.loss in (losses[0], min(losses))
    assert len(losses) == len({(each.rows, each.donor, each.mixed_with) for each in found.considered}) == 10
    rows = sources(found)
    assert rows[:2] == [("random", None), ("queue-mean", None)] and len(rows) == 2 + NEAREST
    again = model.features({k: v for k, v in examples.items() if k != "labels"}, task="next")
    if not found.chosen.mixed_with:
        wanted = closed_form_head(again, examples["labels"], 2).weight
        assert model.head is not None
        torch.testing.assert_close(model.head.weight.double() / model.head.weight.norm(), wanted / wanted.norm())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(**examples).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)


def test_a_finished_tasks_head_is_taken_over_class_by_class(tiny_bert: BertModel) -> None:
    model = model_of(tiny_bert)
    many = texts(200, 5)
    model.start_task("donor", label_names=["no", "yes"], examples=[many])
    model.finish_task()
    one = texts(2, 6)  # one example a class says little, and cannot be judged without the others
    turned = one | {"labels": 1 - one["labels"]}
    test = texts(200, 7)
    for labels, batch in ((["no", "yes"], one), (["yes", "no"], turned)):
        held = test | {"labels": test["labels"] if labels[0] == "no" else 1 - test["labels"]}
        found = model.start_task("next", label_names=labels, start_from="donor", examples=[batch], validation=[held])
        assert found.chosen.mixed_with == ("donor",)
        alone, mixed = found.considered
        assert mixed.loss is not None and alone.loss is not None and mixed.loss < alone.loss
        model.finish_task()
        model.set_task(None)
        model.remove_task("next")


@pytest.mark.parametrize("tasks", [6, 12])
def test_the_cost_of_choosing_does_not_grow_with_the_tasks(
    tiny_bert: BertModel, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tiny_bert)
    for number in range(tasks):
        finish(model, f"task-{number}", number)
    passes = []
    monkeypatch.setattr(model.backbone, "read", lambda *args, read=model.backbone.read: passes.append(1) or read(*args))
    model.start_task("next", label_names=["no", "yes"], start_from="validation", examples=[texts(8), texts(4)])
    assert len(passes) == 2 * (1 + 2 + NEAREST)  # two batches: the base model, two kinds of rows, and the nearest tasks


def test_tasks_with_the_same_classes_come_first_then_the_nearest(tiny_bert: BertModel) -> None:
    model = model_of(tiny_bert)
    finish(model, "other", 9, ("a", "b", "c"))
    finish(model, "near", 3)
    finish(model, "far", 4)
    model.set_task(None)
    far = model.statistics["near"]
    moved = far.features.means + 50
    model.add_statistics("far", type(far).from_tensors(far.tensors() | {"features.means": moved}))
    found = model.start_task("next", label_names=["no", "yes"], start_from="validation", examples=[texts(12, 3)])
    assert [donor for _, donor in sources(found)] == [None, None, "near", "far", "other"]
    assert all("other" not in each.mixed_with for each in found.considered)


def test_what_cannot_be_started_from_is_refused_before_anything_changes(tiny_bert: BertModel) -> None:
    model = model_of(tiny_bert)
    finish(model, "first")
    before, rows = state(model), len(model.training_prefix.queue)
    good = texts(4)
    nothing = {name: x for name, x in good.items() if name != "labels"}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"start_from": "films"}, "start_from is 'films'; it must be .*one of the finished tasks: first"),
        ({"start_from": "validation"}, "start_from is 'validation', which chooses by examples"),
        ({"examples": []}, "examples holds no example"),
        ({"examples": [good | {"labels": torch.full((4,), -100)}]}, "examples holds no example"),
        ({"validation": [good]}, "give examples, too"),
        ({"examples": [nothing]}, "a batch of examples has no labels"),
        ({"examples": [good | {"labels": good["labels"] + 5}]}, "labels holds 5"),
        ({"examples": [good | {"labels": good["labels"][:2]}]}, "labels has shape"),
    ]
    for start, message in refused:
        with pytest.raises(ValueError, match=message):
            model.start_task("next", 2, **start)
    with pytest.raises(TypeError, match="start_from is a NoneType"):
        model.start_task("next", 2, start_from=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a batch is a list"):
        model.start_task("next", 2, examples=[[1]])  # type: ignore[list-item]
    assert len(model.training_prefix.queue) == rows and model.learning.task is None
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    model.start_task("next", 2)


@pytest.mark.parametrize("name", ["previous", "validation", "random"])
def test_words_for_starts_are_no_task_names(tiny_bert: BertModel, name: str) -> None:
    with pytest.raises(ValueError, match=f"name is '{name}', which is no task name"):
        model_of(tiny_bert).start_task(name, 2)


def test_a_donor_without_a_prompt_of_its_own_is_refused_by_name_and_passed_over_otherwise(tiny_bert: BertModel) -> None:
    model = model_of(tiny_bert, shared_length=0, prompt_length=1)
    finish(model, "short")
    adapter = model.adapters["short"]
    model.detach()
    model = model_of(tiny_bert)
    model.add_task(adapter)
    with pytest.raises(ValueError, match="task 'short' has 1 prefix rows"):
        model.start_task("next", 2, start_from="short")
    found = model.start_task("next", 2, start_from="validation", examples=[texts(8)])
    assert {each.rows for each in found.considered} == {"random"}


def test_features_that_are_not_finite_are_refused(tiny_bert: BertModel) -> None:
    model = model_of(tiny_bert)
    examples = texts(6)
    with torch.no_grad():
        tiny_bert.embeddings.word_embeddings.weight[int(examples["input_ids"][3, 0])] = torch.nan
    with pytest.raises(ValueError, match=r"the features of example \d+ of task 'first' are not finite"):
        model.start_task("first", 2, examples=[examples])
    assert model.learning.task is None


def test_where_choosing_fails_the_task_has_started_at_random(
    tiny_bert: BertModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tiny_bert)
    finish(model, "first")
    monkeypatch.setattr(model.training_prefix, "queue_mean", lambda: 1 / 0)
    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError):
        model.start_task("next", 2, start_from="validation", examples=[texts(6)])
    assert model.learning.task == model.active_task == "next"
    rows = model.training_prefix.prompts()
    other = model_of(model.detach())
    finish(other, "first")
    torch.manual_seed(3)
    other.start_task("next", 2)
    assert all(torch.equal(a, b) for a, b in zip(rows, other.training_prefix.prompts()))


def writer(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, pad_token_id=0, **sizes))


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("dtype", [torch.long, torch.int32])
def test_a_language_models_starts_are_judged_by_the_loss_of_each_example(kind: str, dtype: torch.dtype) -> None:
    task_type = "text-to-text" if kind == "t5" else "causal-lm"
    model = QTuningModel(writer(kind).eval(), QTuningConfig(**SMALL, task_type=task_type))
    model.start_task("first")
    model.finish_task()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (5, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # in front, as decoders are padded
    labels = torch.randint(1, 40, (5, 4), generator=generator) if kind == "t5" else ids.masked_fill(mask == 0, -100)
    labels[1, 2:] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels.to(dtype)}
    found = model.start_task("next", start_from="validation", examples=[batch])
    assert [(each.rows, each.donor, each.head) for each in found.considered] == [
        ("random", None, None),
        ("queue-mean", None, None),
        ("prompt", "first", None),
    ]
    with torch.no_grad():
        each = [float(model(**{name: x[row : row + 1] for name, x in batch.items()}).loss) for row in range(5)]
    assert found.chosen.loss == pytest.approx(sum(each) / 5, rel=1e-4)
    bad = batch | {"labels": labels + 100}
    model.finish_task()
    with pytest.raises(ValueError, match="this model has 40 tokens"):
        model.start_task("third", start_from="validation", examples=[bad])
    assert model.learning.task is None
    model.start_task("third", start_from="random", examples=[batch])  # nothing to choose among


@pytest.mark.parametrize("problem_type", [MULTI, REGRESSION])
def test_several_labels_and_numbers_start_in_closed_form_too(tiny_bert: BertModel, problem_type: str) -> None:
    model = model_of(tiny_bert)
    examples = texts(24)
    of_class = examples["labels"].float()
    labels = torch.stack([of_class, 1 - of_class], 1) if problem_type == MULTI else of_class[:, None]
    batch = examples | {"labels": labels}
    for name in ("first", "second"):
        names = ["a", "b"] if problem_type == MULTI else ["number"]
        found = model.start_task(
            name, label_names=names, problem_type=problem_type, start_from="validation", examples=[batch]
        )
        assert found.chosen.head == "closed-form" and not any(each.mixed_with for each in found.considered)
        with torch.no_grad():
            started = float(model(**batch).loss)
        assert started < (0.693 if problem_type == MULTI else 0.25)  # as good as no features
        model.finish_task()
        model.record_statistics(name, [batch])
