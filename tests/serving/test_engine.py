"""The engine: in any mix each text gets the answer that it gets alone, and one bad text harms no other."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pydantic")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtuning_fast.lifelong.saved_run import SavedRun
from qtuning_fast.serving import engine as module
from qtuning_fast.serving.engine import Engine, check_run, passes
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.schema import Answer, Asked, Refused

TASKS = ("colours", "animals", "warm")
WORDS = ["red", "green", "blue", "cat", "dog", "the", "a", "is", "was", "old", "new", "very"]
CLOSE = 1e-4  # of probabilities: sums of up to 32 float32 terms in another order, through three layers


@pytest.fixture(scope="module")
def shared(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(finished_run, ServingOptions(batch=8, adapters=str(tmp_path_factory.mktemp("none-added"))))


@pytest.fixture(scope="module")
def saved(finished_run: Path) -> SavedRun:
    return SavedRun(finished_run)


def questions() -> st.SearchStrategy[Asked]:
    texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join)
    named = st.builds(Asked, texts, st.sampled_from(TASKS))
    inferred = st.builds(Asked, texts, st.none(), st.integers(1, 4))
    wrong = st.sampled_from([Asked(" "), Asked("the\ud800"), Asked("a cat", "unknown"), Asked("", "colours")])
    return st.one_of(named, named, inferred, wrong)


def same(one: Answer | Refused, other: Answer | Refused) -> bool:
    if isinstance(one, Refused) or isinstance(other, Refused):
        return isinstance(one, Refused) and isinstance(other, Refused) and one.args == other.args
    if (one.task, one.adapter, one.labels) != (other.task, other.adapter, other.labels):
        return False
    return one.outputs.keys() == other.outputs.keys() and all(
        p == pytest.approx(other.outputs[name], abs=CLOSE) for name, p in one.outputs.items()
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(questions(), min_size=1, max_size=20))
def test_each_answer_is_the_one_alone(asked: list[Asked], shared: Engine) -> None:
    together = shared.answer(asked)
    assert len(together) == len(asked)
    for each, reply in zip(asked, together):
        (alone,) = shared.answer([each])
        assert same(reply, alone), (each, reply, alone)
        assert not isinstance(reply, Answer) or each.task in (None, reply.task)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=questions())
def test_answers_are_those_of_the_command_line(asked: Asked, shared: Engine, saved: SavedRun) -> None:
    (reply,) = shared.answer([asked])
    if isinstance(reply, Refused):
        assert reply.status == (404 if asked.task == "unknown" else 422)
        return
    if asked.task is None:
        (expected,) = saved.infer([asked.text], top_k=asked.top_k)
        task, output = expected.task, expected.output
        assert reply.inferred is not None
        assert reply.inferred.is_known is expected.is_known
        assert reply.inferred.task_probability == pytest.approx(expected.task_probability, abs=CLOSE)
        assert reply.inferred.probability == pytest.approx(expected.probability, abs=CLOSE)
        assert [each.task for each in reply.inferred.others] == [name for name, _ in expected.runners_up[:3]]
    else:
        task, output = asked.task, saved.predict([asked.text], asked.task)[0]
    assert reply.task == task and reply.words == saved.answer(output, task)
    assert list(reply.outputs) == list(saved.model.label_names(task))
    assert list(reply.outputs.values()) == pytest.approx(output.tolist(), abs=CLOSE)


def test_an_error_stays_with_its_text(shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, calls = shared._saved.model.forward, []

    def forward(*arguments, **named):
        calls.append(named["task_names"])
        if "warm" in named["task_names"]:
            raise RuntimeError("no luck")
        return compute(*arguments, **named)

    monkeypatch.setattr(shared._saved.model, "forward", forward)
    replies = shared.answer([Asked("the red one", "colours"), Asked("a cat", "warm"), Asked("a dog", "animals")])
    assert isinstance(replies[0], Answer) and isinstance(replies[2], Answer)
    assert isinstance(replies[1], Refused) and replies[1].status == 500 and "no luck" in replies[1].message


def test_no_memory_is_worth_a_try_later(shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*arguments, **named):
        raise torch.OutOfMemoryError("8 GiB")

    monkeypatch.setattr(shared._saved.model, "forward", forward)
    (reply,) = shared.answer([Asked("a cat", "warm")])
    assert isinstance(reply, Refused) and (reply.status, reply.retry_after) == (503, 1)


def test_one_pass_answers_all_tasks_of_like_length(shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, calls = shared._saved.model.forward, []
    monkeypatch.setattr(
        shared._saved.model, "forward", lambda **named: calls.append(named["task_names"]) or compute(**named)
    )
    shared.answer([Asked("the red one", name) for name in TASKS] + [Asked("a red one")])
    assert len(calls) == 1 and len(calls[0]) == 4 and {*TASKS} <= {*calls[0]}


# Passes


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.lists(st.tuples(st.sampled_from(TASKS), st.integers(1, 64)), min_size=1, max_size=30),
    rows=st.integers(1, 16),
    slots=st.integers(1, 3),
)
def test_passes_hold_each_sample_once_within_the_limits(samples, rows, slots, shared: Engine) -> None:
    model = shared._saved.model
    names, lengths = [name for name, _ in samples], [length for _, length in samples]
    before = model.slots.device_bytes
    try:
        model.slots.device_bytes = slots * model.slots._slot_bytes
        found = list(passes(model, names, lengths, rows))
    finally:
        model.slots.device_bytes = before
    assert sorted(place for part in found for place in part) == list(range(len(samples)))
    for part in found:
        assert len(part) <= rows and len({names[place] for place in part}) <= slots
        padding = sum(lengths[part[0]] - lengths[place] for place in part)
        assert padding <= module.PASS_COSTS_TOKENS["cpu"] * len(part)


def test_long_texts_do_not_pad_short_ones(shared: Engine) -> None:
    model, lengths = shared._saved.model, [60, 4, 60, 4, 5, 4]
    assert list(passes(model, ["warm"] * 6, lengths, 8)) == [[0, 2], [4, 1, 3, 5]]
    assert list(passes(model, ["warm"] * 3, [12, 4, 9], 8)) == [[0, 2, 1]]  # not worth another pass


# Runs that cannot be served


def test_what_cannot_be_served_is_refused_before_it_is_loaded(tmp_path: Path, run: Path) -> None:
    from qtuning_fast.model.checked_files import read_json, write_json

    with pytest.raises(FileNotFoundError, match="holds no run"):
        check_run(tmp_path / "nothing")
    settings = read_json(run / "run.json")
    settings["method"]["task_type"] = "image-classification"
    write_json(run / "run.json", settings)
    with pytest.raises(ValueError, match="classifies images; only runs that read texts are served"):
        Engine(run, ServingOptions())


def test_without_statistics_the_task_must_be_named(run: Path) -> None:
    from qtuning_fast.model.checked_files import read_json, write_json

    index = read_json(run / "adapter" / "adapter_config.json")
    for entry in index["tasks"]:
        del entry["statistics"]
    write_json(run / "adapter" / "adapter_config.json", index)
    unnamed, named = Engine(run, ServingOptions()).answer([Asked("a cat"), Asked("a cat", "animals")])
    assert isinstance(unnamed, Refused) and (unnamed.status, unnamed.field) == (422, "task")
    assert "qtuning-fast statistics" in unnamed.message and isinstance(named, Answer)


def test_tasks_are_listed_a_part_at_a_time(engine: Engine) -> None:
    first = engine.tasks(limit=2)
    assert [each.name for each in first.tasks] == ["animals", "colours"] and (first.total, first.next) == (3, "colours")
    rest = engine.tasks(after=first.next)
    assert [each.name for each in rest.tasks] == ["warm"] and rest.next is None
    assert first.tasks[0].labels == list(engine._saved.model.label_names("animals")) and first.tasks[0].is_inferred
