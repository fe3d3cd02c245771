"""The plain scores are those of this library; examples in context are those that other arms train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qtuning_fast.bench.language.arms import MODELS
from qtuning_fast.bench.language.peers import with_peft
from qtuning_fast.bench.language.scores import (
    EXAMPLES_A_CLASS,
    InContext,
    chosen_examples,
    plain_scores,
    scores_of,
    tokens_in_front,
)
from qtuning_fast.integrations.peft import adapter_from_peft
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.model.model import QTuningModel
from qtuning_fast.model.scoring import answer_scores

ANSWERS = [[3, 1], [4, 5, 6, 1], [4, 1], [7, 8, 1]]
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
INPUTS = {"input_ids": torch.randint(3, 16, (3, 7), generator=torch.Generator().manual_seed(0)), "attention_mask": MASK}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [5, 99])
def test_they_are_those_of_this_library(name: str, rows: int, loaded: Callable[..., Any]) -> None:
    base, _, _ = loaded(name)
    plain = plain_scores(base, INPUTS, ANSWERS, two_stacks=name == "flan-t5", rows=rows)
    model = QTuningModel(base, QTuningConfig(task_type=MODELS[name].task_type))
    torch.testing.assert_close(plain, answer_scores(model, INPUTS, ANSWERS), atol=1e-5, rtol=0)
    assert plain.shape == (3, 4) and plain.std() > 0.1


@pytest.mark.parametrize(("name", "method"), [("smollm2", "prompt-tuning"), ("smollm2", "prefix-tuning")])
def test_under_a_prompt_of_peft_they_are_those_of_the_converted_adapter(
    name: str, method: str, loaded: Callable[..., Any]
) -> None:
    base, _, _ = loaded(name)
    torch.manual_seed(0)
    wrapped = with_peft(base, method, MODELS[name])
    plain = plain_scores(wrapped, INPUTS, ANSWERS, two_stacks=False)
    bare = plain_scores(base, INPUTS, ANSWERS, two_stacks=False)
    assert (plain - bare).abs().max() > 0.1
    adapter = adapter_from_peft(wrapped, "task")
    placement = "input" if method == "prompt-tuning" else "prefix"
    model = QTuningModel(base, QTuningConfig(task_type="causal-lm", placement=placement, queue_size=1)).eval()
    model.add_task(adapter)
    model.set_task("task")
    torch.testing.assert_close(plain, answer_scores(model, INPUTS, ANSWERS), atol=1e-4, rtol=0)


def test_the_scores_of_examples_keep_their_order(loaded: Callable[..., Any], toy_tasks: list[Task]) -> None:
    base, _, encoder = loaded("smollm2")
    task = toy_tasks[1]
    answers = encoder.encode_answers(task.answers, task=task.name)
    test = encoder.as_asked(encoder.encode(task.test), task.template)
    found = scores_of(base, test, answers, two_stacks=False, device=base.device, rows=7)
    alone = plain_scores(base, {k: v for k, v in test.columns.items() if k != "labels"}, answers, two_stacks=False)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_a_cache_of_what_was_read_gives_the_scores_of_reading_it_each_time(loaded: Callable[..., Any]) -> None:
    base, _, _ = loaded("smollm2")
    front = [3, 9, 14, 1, 5, 4]
    whole = {
        "input_ids": torch.cat([torch.tensor([front] * 3), INPUTS["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones(3, len(front), dtype=torch.long), MASK], 1),
    }
    reader = InContext(base, front)
    for _ in range(2):  # the cache is as it was
        found = plain_scores(reader, INPUTS, ANSWERS, two_stacks=False, rows=5)
        torch.testing.assert_close(found, plain_scores(base, whole, ANSWERS, two_stacks=False), atol=1e-5, rtol=0)


def test_examples_in_context(loaded: Callable[..., Any], toy_tasks: list[Task]) -> None:
    _, tokenizer, encoder = loaded("smollm2")
    task = toy_tasks[0]
    chosen = chosen_examples(task, 3)
    assert sorted(chosen.labels) == [0] * EXAMPLES_A_CLASS + [1] * EXAMPLES_A_CLASS
    train = dict(zip(task.train.inputs, task.train.labels))
    assert all(train[text] == label for text, label in zip(chosen.inputs, chosen.labels))
    other = chosen_examples(task, 4)
    assert {*other.inputs} == {*chosen.inputs} and other.inputs != chosen.inputs
    assert chosen_examples(task, 3) == chosen
    answers = encoder.encode_answers(task.answers, task=task.name)
    said = " ".join(
        f"it is {text} it {task.answers[int(label)]} </s>"  # type: ignore[arg-type]
        for text, label in zip(chosen.inputs, chosen.labels)
    )
    words = said.split()
    expected = [1 if word == "</s>" else tokenizer.convert_tokens_to_ids(word) for word in words]
    assert tokens_in_front(chosen, encoder, answers, task.template) == expected  # a line end is no token to this one
