"""Answers to examples whose task nobody names."""

from __future__ import annotations

import pytest
import torch
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.lifelong.answers import Answering, statistics_of
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.evaluation import features
from qtuning_fast.method.labels import MULTI
from qtuning_fast.method.task_inference import TaskInference
from qtuning_fast.method.task_rules import ClosedForm, RanPAC


def examples(token: int, count: int, seed: int = 0) -> EncodedExamples:
    """Texts of one task: their first half tells the task and the class."""
    generator = torch.Generator().manual_seed(seed + token)
    labels = torch.randint(0, 2, (count,), generator=generator)
    ids = torch.randint(20, 40, (count, 8), generator=generator)
    ids[:, :4] = token + labels[:, None]
    return EncodedExamples({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})


@pytest.fixture
def model(tiny_bert: BertModel) -> QTuningModel:
    model = QTuningModel(tiny_bert, QTuningConfig(prompt_length=2, shared_length=2))
    for name, token in (("first", 5), ("second", 10), ("third", 15)):
        model.start_task(name, 2)
        model.finish_task()
        train, validation = (
            (features(model, x, 8, task=None), x.columns["labels"])
            for x in (examples(token, 24), examples(token, 9, 1))
        )
        model.add_statistics(name, statistics_of(train, validation, 2, ClosedForm()))
    return model


@pytest.fixture
def inferring(model: QTuningModel) -> Answering:
    return Answering(model, 4, lambda task: None, lambda task, examples: examples)


def mixed() -> EncodedExamples:
    parts = [examples(token, 3, 2) for token in (5, 15, 10)]
    return EncodedExamples({name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns})


def inferred(model: QTuningModel, inferring: Answering, given: EncodedExamples) -> TaskInference:
    return inferring.infer(model.fit_task_rule(), given, features(model, given, 4, task=None))


def test_each_example_is_answered_by_its_task(model: QTuningModel, inferring: Answering) -> None:
    given = mixed()
    inference = inferred(model, inferring, given)
    assert inference.task_names == ["first"] * 3 + ["third"] * 3 + ["second"] * 3
    for place, answer in enumerate(inferring.answer(inference, given)):
        model.set_task(answer.task)
        alone = {name: x[place : place + 1] for name, x in given.columns.items() if name != "labels"}
        with torch.no_grad():
            probabilities = model(**alone).logits.softmax(-1)[0]
        torch.testing.assert_close(answer.output, probabilities, atol=1e-5, rtol=1e-5)
        p = dict(inference.top(3)[place])
        assert answer.task == inference.task_names[place]
        assert answer.probability == pytest.approx(p[answer.task] * float(probabilities.max()), rel=1e-4)
        assert dict(answer.runners_up) == {name: each for name, each in p.items() if name != answer.task}
        assert [each for _, each in answer.runners_up] == sorted((each for _, each in answer.runners_up), reverse=True)


def test_several_likely_tasks_are_weighed(model: QTuningModel, inferring: Answering) -> None:
    given = mixed()
    inference = inferred(model, inferring, given)
    by_task = {name: inferring.ask(name, given) for name in model.tasks}
    for place, answer in enumerate(inferring.answer(inference, given, top_k=5)):
        weighed = {name: p * float(by_task[name][place].max()) for name, p in inference.top(3)[place]}
        assert answer.task == max(weighed, key=weighed.__getitem__)
        assert answer.probability == pytest.approx(max(weighed.values()), rel=1e-4)


def test_a_task_without_one_class_counts_by_its_own_probability(model: QTuningModel, inferring: Answering) -> None:
    model.start_task("labels", 3, problem_type=MULTI)
    model.finish_task()
    train, validation = (
        (features(model, examples(18, n), 8, task=None), torch.zeros(n, dtype=torch.long)) for n in (12, 5)
    )
    model.add_statistics("labels", statistics_of(train, validation, 1, ClosedForm()))
    given = examples(18, 3, 4)
    inference = inferred(model, inferring, given)
    for place, answer in enumerate(inferring.answer(inference, given)):
        assert answer.task == "labels" and answer.output.shape == (3,)
        assert answer.probability == pytest.approx(inference.top(1)[place][0][1])
    for answer in inferring.answer(inference, given, top_k=4):  # there is nothing to weigh it with
        assert answer.task == "labels"


def test_the_active_task_stays(model: QTuningModel, inferring: Answering) -> None:
    model.set_task("second")
    given = mixed()
    inferring.answer(inferred(model, inferring, given), given, top_k=2)
    assert model.active_task == "second"


def test_a_subset_is_asked_as_the_whole_is(model: QTuningModel, inferring: Answering) -> None:
    given = mixed()
    outputs = inferring.ask_each(["third", "first"], given.subset([4, 0]))
    torch.testing.assert_close(outputs[0], inferring.ask("third", given)[4])
    torch.testing.assert_close(outputs[1], inferring.ask("first", given)[0])


def test_statistics_hold_what_the_rule_needs() -> None:
    rows, labels = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    assert set(statistics_of((rows, labels), (rows, labels), 2, ClosedForm()).moments) == {"features"}
    rule = RanPAC(size=7)
    assert statistics_of((rows, labels), (rows, labels), 2, rule).moments[rule.feature_map].means.shape == (2, 7)
