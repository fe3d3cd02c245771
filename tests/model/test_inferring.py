"""Calls whose tasks are inferred: each sample as if its task had been named, whatever stands around it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from qtuning_fast.method.labels import MULTI
from qtuning_fast.method.task_inference import TaskInference
from qtuning_fast.method.task_rule import TaskRule

Batch = dict[str, Tensor]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SHORT = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture
def model(kind: Any, recognising: Any) -> Any:
    return recognising(kind, 3)


@pytest.fixture
def bert(families: Any, recognising: Any) -> Any:
    return recognising(families["BERT"], 3)


@pytest.fixture
def mixed(families: Any, inputs_of: Any) -> Batch:
    """Inputs of three tasks for `bert`, six in all."""
    return joined([inputs_of(families["BERT"], task, 2, seed=3) for task in (1, 0, 2)])


def joined(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def rows(batch: Batch, index: Any) -> Batch:
    return {name: x[index] for name, x in batch.items()}


def read(batch: Batch) -> Batch:
    return {name: x for name, x in batch.items() if not name.startswith("decoder_")}


def padded(batch: Batch, left: int, right: int) -> Batch:
    """The same inputs with more padding on both sides, whose token is of another task."""
    return {
        name: x if name.startswith("decoder_") else pad(x, (left, right), value=0 if name == "attention_mask" else 39)
        for name, x in batch.items()
    }


def assert_same_choice(found: TaskInference, expected: TaskInference, index: Any = slice(None)) -> None:
    torch.testing.assert_close(found.class_probabilities, expected.class_probabilities[index], **CLOSE)
    assert found.distances is not None and expected.distances is not None
    torch.testing.assert_close(found.distances, expected.distances[index], atol=1e-3, rtol=1e-4)
    assert found.task_names == [expected.tasks[place] for place in expected.task_probabilities[index].argmax(1)]


# A sample's task is its own


def test_tasks_are_found_and_computed_as_if_they_had_been_named(model: Any, kind: Any, inputs_of: Any) -> None:
    batch = joined([inputs_of(kind, task, 8, seed=3) for task in (2, 0, 1)])
    right = ["task-2"] * 8 + ["task-0"] * 8 + ["task-1"] * 8
    found = model.infer_tasks(**batch)
    assert sum(a == b for a, b in zip(found.task_names, right)) >= 16 and len(set(found.task_names)) == 3
    with torch.no_grad():
        output, named = model(**batch, task_names="infer"), model(**batch, task_names=found.task_names)
    torch.testing.assert_close(output.logits, named.logits, atol=0, rtol=0)
    assert output.task_index.dtype == torch.int64
    assert [model.tasks[index] for index in output.task_index] == found.task_names
    assert named.get("task_index") is None


def test_what_stands_around_a_sample_changes_nothing(model: Any, kind: Any, inputs_of: Any) -> None:
    batch = joined([inputs_of(kind, task, 4, seed=3) for task in (2, 0, 1)])
    expected = model.infer_tasks(**batch)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for index in (order, order[:5], *([row] for row in range(12))):
        assert_same_choice(model.infer_tasks(**rows(batch, index)), expected, index)
    logits = model(**batch, task_names="infer").logits
    torch.testing.assert_close(
        model(**rows(batch, order), task_names="infer").logits, logits[order], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("left", "right"), [(4, 0), (0, 4), (2, 3)])
@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "ModernBERT", "T5", "Llama", "GPT-2"])
def test_padding_changes_nothing(
    name: str, left: int, right: int, families: Any, recognising: Any, inputs_of: Any
) -> None:
    family = families[name]
    model = recognising(family, 3)
    batch = joined([inputs_of(family, task, 4, seed=3) for task in (2, 0, 1)])
    expected = model.infer_tasks(**batch)
    assert_same_choice(model.infer_tasks(**padded(batch, left, right)), expected)
    alone = rows(batch, [0])  # its padding taken away
    tokens = alone["attention_mask"][0].bool()
    assert not tokens.all()
    short = {key: x if key.startswith("decoder_") else x[:, tokens] for key, x in alone.items()}
    assert_same_choice(model.infer_tasks(**short), expected, [0])
    del short["attention_mask"]
    assert_same_choice(model.infer_tasks(**short), expected, [0])


def test_what_all_samples_share_is_given_to_each(bert: Any, mixed: Batch) -> None:
    mixed["attention_mask"][:] = 1
    for name, row in (("position_ids", torch.arange(3, 10)), ("token_type_ids", torch.ones(7, dtype=torch.long))):
        each = bert.infer_tasks(**mixed, **{name: row.expand(6, -1)}).class_probabilities
        assert torch.equal(bert.infer_tasks(**mixed, **{name: row[None]}).class_probabilities, each)
        assert not torch.allclose(bert.infer_tasks(**mixed).class_probabilities, each)


def test_the_active_task_stays_and_changes_nothing(bert: Any, mixed: Batch) -> None:
    expected = bert.infer_tasks(**mixed).class_probabilities
    logits = bert(**mixed, task_names="infer").logits
    bert.set_task("task-1")
    under = bert(**mixed).logits
    for _ in range(2):
        assert torch.equal(bert.infer_tasks(**mixed).class_probabilities, expected)
        assert torch.equal(bert(**mixed, task_names="infer").logits, logits)
        assert bert.active_task == "task-1" and torch.equal(bert(**mixed).logits, under)
    bert.start_task("new", 2)
    bert.train()
    live = bert(**mixed, labels=torch.tensor([0, 1] * 3)).loss
    assert torch.equal(bert.infer_tasks(**mixed).class_probabilities, expected)
    assert torch.equal(bert(**mixed, task_names="infer").logits, logits)
    assert bert.active_task == "new" and bert.training
    assert torch.equal(bert(**mixed, labels=torch.tensor([0, 1] * 3)).loss, live)


# Generation


@pytest.mark.parametrize("name", ["T5", "Llama"])
def test_it_generates_as_if_tasks_had_been_named(name: str, families: Any, recognising: Any, inputs_of: Any) -> None:
    family = families[name]
    model = recognising(family, 3)
    batch = read(joined([inputs_of(family, task, 2, seed=3) for task in (2, 0, 1)]))
    names = model.infer_tasks(**batch).task_names
    assert len(set(names)) == 3
    ids, mask = batch["input_ids"], {"attention_mask": batch["attention_mask"]}
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        expected = model.generate(**batch, task_names=names, **SHORT, **options)
        assert torch.equal(model.generate(**batch, task_names="infer", **SHORT, **options), expected)
        assert torch.equal(model.generate(ids, **mask, task_names="infer", **SHORT, **options), expected)
        assert torch.equal(model.generate(inputs=ids, **mask, task_names="infer", **SHORT, **options), expected)
    words = model.base_model.get_input_embeddings()(ids)
    expected = model.generate(inputs_embeds=words, **mask, task_names=names, **SHORT)
    assert torch.equal(model.generate(inputs_embeds=words, **mask, task_names="infer", **SHORT), expected)
    assert model.active_task is None


# Several of the likeliest tasks


def test_of_the_likeliest_tasks_the_surest_answer_is_taken(bert: Any, mixed: Batch, each_by_itself: Any) -> None:
    bert.task_rule = "nearest-mean"  # which is less sure, so that adapters matter
    found = bert.infer_tasks(**mixed)
    answers = {name: each_by_itself(bert, mixed, [name] * 6) for name in bert.tasks}
    changed = 0
    for k in (2, 3, 7):
        names = []
        for row, likeliest in enumerate(found.top(k)):
            sure = {name: p * float(answers[name][row].double().softmax(0).max()) for name, p in likeliest}
            names.append(max(sure, key=sure.__getitem__))
        output = bert(**mixed, task_names="infer", top_k=k)
        assert [bert.tasks[index] for index in output.task_index] == names
        assert torch.equal(output.logits, bert(**mixed, task_names=names).logits)
        changed += names != found.task_names
    assert changed, "no adapter ever mattered"


class AlmostAlike(TaskRule):
    """Gives a task of one class a probability of 0.28, and each of three others 0.24."""

    name = "almost-alike"
    needs_statistics = False

    def fit(self, candidates: Any) -> Any:
        shares = [
            (0.28 if each.classes == 1 else 0.24) / each.classes for each in candidates for _ in range(each.classes)
        ]
        return lambda evidence: torch.tensor(shares).double().log().expand(len(evidence.features), -1)


def test_an_answer_that_is_no_class_counts_as_its_task(bert: Any, mixed: Batch) -> None:
    bert.start_task("many", 3, problem_type=MULTI)
    bert.finish_task()
    bert.set_task(None)
    bert.task_rule = AlmostAlike()
    assert bert.infer_tasks(**mixed).task_probabilities[0].tolist() == pytest.approx([0.24, 0.24, 0.24, 0.28])
    logits = bert(**mixed, task_names=["many"] * 6).logits
    assert logits.softmax(1).amax() < 0.8  # the softmax of a multi-label answer means nothing, and must not count
    assert bert(**mixed, task_names="infer", top_k=4).task_index.tolist() == [3] * 6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"task_names": "infer", "top_k": 0}, "top_k is 0; it must be an integer, at least 1"),
        ({"task_names": "infer", "top_k": 2.0}, "top_k is 2.0; it must be an integer"),
        ({"top_k": 2}, 'top_k is 2, but task_names is not "infer"'),
        ({"task_names": ["task-0"] * 6, "top_k": 2}, 'top_k is 2, but task_names is not "infer"'),
        ({"task_names": "task-0"}, "task_names is 'task-0'; it must hold one name for each sample, or be \"infer\""),
    ],
)
def test_calls_that_are_refused(bert: Any, mixed: Batch, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        bert(**mixed, **options)


def test_what_a_model_that_writes_cannot_do(families: Any, recognising: Any, inputs_of: Any) -> None:
    family = families["T5"]
    model, batch = recognising(family, 2), inputs_of(family, 1)
    with pytest.raises(ValueError, match="top_k is 2, but task_type='text-to-text' has no heads"):
        model(**batch, task_names="infer", top_k=2)
    encoded = model.base_model.get_encoder()(input_ids=batch["input_ids"])
    with pytest.raises(
        ValueError, match=r"encoder_outputs.*cannot be inferred; give the input itself, or its task_names"
    ):
        model(encoder_outputs=encoded, decoder_input_ids=batch["decoder_input_ids"], task_names="infer")
    family = families["Llama"]
    model, batch = recognising(family, 2), inputs_of(family, 1)
    cache = model(**batch, task_names="infer", use_cache=True).past_key_values
    more = {"input_ids": batch["input_ids"][:, :1], "past_key_values": cache}
    with pytest.raises(ValueError, match=r"continue a cache cannot be inferred; call infer_tasks with the whole input"):
        model(**more, task_names="infer")
    with pytest.raises(ValueError, match="the batch size is unknown"):
        model.infer_tasks(attention_mask=batch["attention_mask"])


# Labels, options


def test_labels_belong_to_a_named_task(bert: Any, mixed: Batch) -> None:
    with pytest.raises(ValueError, match="labels belong to a named task"):
        bert(**mixed, task_names="infer", labels=torch.tensor([0, 1, -100, 1, 0, 1]))
    plain = bert.infer_tasks(**mixed)
    assert torch.equal(bert.infer_tasks(**mixed, labels=torch.zeros(6)).task_probabilities, plain.task_probabilities)


def test_tokens_have_a_loss_under_the_inferred_tasks(families: Any, recognising: Any) -> None:
    model = recognising(families["T5"], 2)
    batch = {name: x for name, x in families["T5"].batch().items() if not name.startswith("decoder_")}
    names = model.infer_tasks(**batch).task_names
    expected = model(**batch, task_names=names, labels=batch["input_ids"]).loss
    found = model(**batch, task_names="infer", labels=batch["input_ids"])
    assert torch.equal(found.loss, expected) and [model.tasks[i] for i in found.task_index] == names


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"prior": {"task-0": 1.0}}, r"infer_tasks got prior=.*, which is neither an input .* nor one of its options"),
        ({"treshold": -1}, "infer_tasks got treshold=-1"),
        ({"token_type_ids": [[0]]}, "infer_tasks got token_type_ids"),
    ],
)
def test_misspelt_options_are_refused(given: dict[str, Any], named: str, bert: Any, mixed: Batch) -> None:
    with pytest.raises(TypeError, match=named):
        bert.infer_tasks(**mixed, **given)


@pytest.mark.parametrize("name", ["priors", "threshold", "false_alarm_rate"])
def test_options_of_infer_tasks_are_not_those_of_a_call(name: str, bert: Any, mixed: Batch) -> None:
    with pytest.raises(TypeError, match=f"{name} is an option of infer_tasks; call that"):
        bert(**mixed, task_names="infer", **{name: 0.5})


def test_generate_without_a_mask_reads_padding_as_generate_does(families: Any, recognising: Any) -> None:
    model = recognising(families["Llama"], 3)
    ids = families["Llama"].batch()["input_ids"]
    pad = int(ids.max()) + 1
    padded = torch.cat([torch.full((len(ids), 3), pad), ids], dim=1)
    model.base_model.generation_config.pad_token_id = pad
    given: list[list[str]] = []
    using = model.using

    def watched(names: list[str], batch: int) -> Any:
        given.append(list(names))
        return using(names, batch)

    model.using = watched
    model.generate(padded, task_names="infer", max_new_tokens=1)
    mask = (padded != pad).long()
    assert given[-1] == model.infer_tasks(input_ids=padded, attention_mask=mask).task_names
    read = model.backbone.read_by_generate((padded,), {})
    assert torch.equal(read["attention_mask"], mask)
    model.base_model.generation_config.eos_token_id = [pad]  # then transformers makes no mask either
    assert "attention_mask" not in model.backbone.read_by_generate((padded,), {})


def test_a_rule_is_fitted_anew_when_it_is_set(bert: Any, mixed: Batch) -> None:
    class Favourite(TaskRule):
        name = "favourite"
        task = "task-0"

        def fit(self, candidates: Any) -> Any:
            row = [0.0 if each.name == self.task else -torch.inf for each in candidates for _ in range(each.classes)]
            return lambda evidence: torch.tensor([row] * len(evidence.features), dtype=torch.float64)

    bert.task_rule = rule = Favourite()
    assert bert.infer_tasks(**mixed).task_names == ["task-0"] * 6
    rule.task = "task-2"
    bert.task_rule = rule
    assert bert.infer_tasks(**mixed).task_names == ["task-2"] * 6
    assert bert.active_task is None
    with bert.keeping_task():
        bert.set_task("task-1")
    assert bert.active_task is None


def test_options_of_inference(bert: Any, mixed: Batch) -> None:
    plain = bert.infer_tasks(**mixed)
    found = bert.infer_tasks(**mixed, priors={"task-1": 2.0, "task-2": 1})
    assert (found.task_probabilities[:, 0] == 0).all() and (found.task_probabilities.sum(1) - 1).abs().max() < 1e-12
    assert plain.distances is not None and torch.equal(found.distances, plain.distances)
    middle = float(plain.distances.median())
    assert bert.infer_tasks(**mixed, threshold=middle).is_known.sum() == (plain.distances <= middle).sum()
    assert bert.infer_tasks(**mixed, false_alarm_rate=0.9).threshold < plain.threshold
    with pytest.raises(ValueError, match="priors names task 'x', which cannot be chosen; the tasks are task-0, task-1"):
        bert.infer_tasks(**mixed, priors={"x": 1})


# Precisions and modes


@pytest.mark.parametrize("mode", ["autocast", "inference mode", "no grad"])
def test_modes_in_which_a_call_may_be(mode: str, bert: Any, mixed: Batch, families: Any, inputs_of: Any) -> None:
    entered = {
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "inference mode": torch.inference_mode(),
        "no grad": torch.no_grad(),
    }
    expected, logits = bert.infer_tasks(**mixed), bert(**mixed, task_names="infer").logits
    for first in (entered[mode], nullcontext()):  # what was fitted in the mode is used outside it
        bert.record_statistics("task-0", [inputs_of(families["BERT"], 0, 24) | {"labels": torch.arange(24) % 2}])
        with first:
            bert.record_statistics("task-1", [inputs_of(families["BERT"], 1, 24) | {"labels": torch.arange(24) % 3}])
            found = bert.infer_tasks(**mixed)
            assert found.task_names == expected.task_names and found.task_probabilities.dtype == torch.float64
            torch.testing.assert_close(bert(**mixed, task_names="infer").logits.float(), logits, atol=0.2, rtol=0.02)
        assert bert.infer_tasks(**mixed).task_names == expected.task_names


def test_a_model_in_bfloat16(families: Any, recognising: Any, inputs_of: Any) -> None:
    family = families["BERT"]
    model, base = recognising(family, 3), family.base_model().to(torch.bfloat16)
    batch = joined([inputs_of(family, task, 8, seed=3) for task in (2, 0, 1)])
    expected = model.infer_tasks(**batch).task_names
    half = type(model)(base, model.qtuning_config)
    for name in model.tasks:
        half.add_task(model.adapters[name], model.statistics[name])
    names = half.infer_tasks(**batch).task_names
    assert sum(a == b for a, b in zip(names, expected)) >= 22
    logits = half(**batch, task_names="infer").logits
    assert torch.equal(logits, half(**batch, task_names=names).logits)


@pytest.mark.thorough
def test_a_compiled_model_answers_the_same(bert: Any, mixed: Batch) -> None:
    """Its tasks are inferred outside the graph."""
    with torch.no_grad():
        expected = bert(**mixed, task_names="infer")
        output = torch.compile(bert, backend="eager")(**mixed, task_names="infer")
    torch.testing.assert_close(output.logits, expected.logits, **CLOSE)
    assert torch.equal(output.task_index, expected.task_index)


# Threads


def test_tasks_come_and_go_while_others_infer(bert: Any, mixed: Batch) -> None:
    """A call sees a task or does not; its answer is always that of the tasks it saw."""
    kept = bert.adapters["task-2"], bert.statistics["task-2"]
    with_it = bert(**mixed, task_names="infer").logits.detach()
    bert.remove_task("task-2")
    without = bert(**mixed, task_names="infer").logits.detach()
    assert with_it.shape != without.shape  # task-2 has most classes
    done = threading.Event()

    def change() -> int:
        times = 0
        while not done.is_set():
            bert.add_task(*kept)
            bert.remove_task("task-2")
            times += 1
        return times

    @torch.no_grad()
    def infer() -> None:
        for _ in range(25):
            logits = bert(**mixed, task_names="infer").logits
            torch.testing.assert_close(logits, with_it if logits.shape == with_it.shape else without, **CLOSE)
            bert(**mixed, task_names="infer", top_k=2)
            assert bert.infer_tasks(**mixed).tasks in (("task-0", "task-1"), ("task-0", "task-1", "task-2"))

    with ThreadPoolExecutor(3) as threads:
        changing, inferring = threads.submit(change), [threads.submit(infer) for _ in range(2)]
        try:
            for each in inferring:
                each.result(60)
        finally:
            done.set()
        assert changing.result(60) > 1
