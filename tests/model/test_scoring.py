"""Scores of answers against one sample and one answer at a time, without padding, caches and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qtuning_fast import QTuningConfig, QTuningModel, answer_scores

WRITING = ["T5", "BART", "Llama", "Mistral", "Gemma 2", "Gemma 3", "GPT-2", "OPT", "GPT-NeoX"]
ANSWERS = [[7, 9, 3], [7], [7, 9], [11, 12, 13, 14, 3], [6, 3]]
SMALL = {"prompt_length": 2, "queue_size": 3, "shared_length": 1, "reparameterization": None}


def with_tasks(family: Any, **changes: Any) -> QTuningModel:
    """A model with two finished tasks of different length, and the second one live."""
    model = QTuningModel(family.base_model(), QTuningConfig(**(SMALL | {"task_type": family.task_type} | changes)))
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model.start_task(name)
        with torch.no_grad():
            for parameter in model.training_prefix.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.5)
        model.finish_task()
    return model.eval()


def one_by_one(model: QTuningModel, inputs: dict[str, Tensor], answers: list[list[int]]) -> Tensor:
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        tokens = ids[mask == 1]
        rows.append(torch.stack([one(model, tokens, torch.tensor(answer)) for answer in answers]))
    return torch.stack(rows)


@torch.no_grad()
def one(model: QTuningModel, tokens: Tensor, answer: Tensor) -> Tensor:
    config = model.base_model.config
    if config.is_encoder_decoder:
        begun = torch.cat([torch.tensor([config.decoder_start_token_id]), answer[:-1]])
        logits = model(input_ids=tokens[None], decoder_input_ids=begun[None], use_cache=False).logits[0]
    else:
        whole = torch.cat([tokens, answer])
        logits = model(input_ids=whole[None], use_cache=False).logits[0, len(tokens) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum()


def question(family: Any) -> dict[str, Tensor]:
    batch = family.batch()
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def other_side(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with the padding of its first sample on the other side."""
    mask = inputs["attention_mask"]
    shift = int((mask[0] == 0).sum()) * (1 if mask[0, 0] else -1)
    return {name: torch.stack([x[0].roll(shift), *x[1:]]) for name, x in inputs.items()}


@pytest.mark.parametrize("placement", ["prefix", "input"])
@pytest.mark.parametrize("family", WRITING, indirect=True)
def test_scores_are_those_of_one_answer_at_a_time(family: Any, placement: str) -> None:
    model = with_tasks(family, placement=placement)
    inputs = question(family)
    for task, live in (("first", False), ("first", True), (None, False)):
        model.set_task(task, live=live)
        expected = one_by_one(model, inputs, ANSWERS)
        for batch_size in (1, 7, 256):
            torch.testing.assert_close(answer_scores(model, inputs, ANSWERS, batch_size=batch_size), expected)
        if family.kind == "decoder":  # where an encoder's padding is matters to positions that are learned
            torch.testing.assert_close(answer_scores(model, other_side(inputs), ANSWERS), expected)


@pytest.mark.parametrize("stack", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("family", ["T5", "Llama"], indirect=True)
def test_each_sample_answers_under_its_own_task(family: Any, stack: str) -> None:
    model = with_tasks(family, stack=stack)
    inputs, names = question(family), ["second", "first", "second"]
    scores = answer_scores(model, inputs, ANSWERS, task_names=names, batch_size=6)
    for row, name in enumerate(names):
        model.set_task(name)
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        torch.testing.assert_close(scores[row : row + 1], answer_scores(model, alone, ANSWERS))
    with pytest.raises(ValueError, match="task_names"):
        answer_scores(model, inputs, ANSWERS, task_names=["first"])


@pytest.mark.parametrize("family", ["T5", "Llama"], indirect=True)
def test_answers_of_one_length_are_the_loss_with_its_sign_turned(family: Any) -> None:
    model = with_tasks(family)
    model.set_task("first")
    # without the padded sample: on the left its padding would take positions
    inputs, answer = {name: x[1:] for name, x in question(family).items()}, torch.tensor([7, 9, 3])
    labels = answer.repeat(2, 1)
    given = dict(inputs)
    if family.kind == "decoder":
        given = {"input_ids": torch.cat([inputs["input_ids"], labels], dim=1)}
        given["attention_mask"] = F.pad(inputs["attention_mask"], (0, 3), value=1)
        labels = F.pad(labels, (inputs["input_ids"].shape[1], 0), value=-100)
    loss = model(**given, labels=labels).loss
    torch.testing.assert_close(answer_scores(model, inputs, [answer.tolist()]).mean(), -3 * loss.detach())


@pytest.mark.parametrize("family", ["Llama"], indirect=True)
def test_scoring_leaves_the_model_as_it_was(family: Any) -> None:
    model = with_tasks(family)
    model.set_task("first")
    model.train()
    inputs = question(family)
    before = model(**inputs).logits
    scores = answer_scores(model, inputs, ANSWERS, task_names=["second"] * 3)
    assert model.training and not scores.requires_grad and scores.dtype == torch.float32
    assert torch.equal(model(**inputs).logits, before)
    without_mask = answer_scores(model, {"input_ids": inputs["input_ids"][1:]}, ANSWERS)
    torch.testing.assert_close(without_mask, answer_scores(model, inputs, ANSWERS)[1:])


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ([], ValueError, "answers is empty"),
        ([[5], []], ValueError, "at least one token"),
        ([[5], [40]], ValueError, "ids below 40"),
        ([[5], [-100]], ValueError, "ids below 40"),
        (["yes", "no"], TypeError, "sequence of token ids"),
    ],
)
@pytest.mark.parametrize("family", ["T5"], indirect=True)
def test_answers_that_cannot_be_scored(family: Any, answers: Any, error: type[Exception], message: str) -> None:
    model = with_tasks(family)
    with pytest.raises(error, match=message):
        answer_scores(model, question(family), answers)


@pytest.mark.parametrize("family", ["Llama"], indirect=True)
def test_inputs_that_cannot_be_answered(family: Any) -> None:
    model = with_tasks(family)
    inputs = question(family)
    inputs["attention_mask"][0] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        answer_scores(model, inputs, ANSWERS)


@pytest.mark.parametrize("family", ["BERT"], indirect=True)
def test_a_model_with_heads_has_no_answers(family: Any) -> None:
    model = QTuningModel(family.base_model(), QTuningConfig(task_type=family.task_type))
    with pytest.raises(ValueError, match="task_type is 'sequence-classification'"):
        answer_scores(model, question(family), ANSWERS)
