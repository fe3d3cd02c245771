"""Threads and asyncio tasks that share one model: each gets the answers of its own task, or an error that says why."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 3, "shared_length": 1, "reparameterization": None, "retention_weight": 0.0}
NAMES = ("first", "second")
PLACEMENTS = ["prefix", "input"]
ROUNDS = 12
DEADLINE = 120  # seconds: a deadlock fails


def at_once(*runs: Callable[[], Any]) -> list[Any]:
    """What these return, each called in a thread of its own, all at once."""
    start, futures = threading.Barrier(len(runs)), [Future[Any]() for _ in runs]

    def body(run: Callable[[], Any], future: Future[Any]) -> None:
        start.wait()
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    threads = [threading.Thread(target=body, args=each, daemon=True) for each in zip(runs, futures)]
    for thread in threads:
        thread.start()
    results = [future.result(DEADLINE) for future in futures]
    for thread in threads:
        thread.join(DEADLINE)  # what it has set ends with it
    return results


def in_thread(run: Callable[[], Any]) -> Any:
    return at_once(run)[0]


def two_tasks(family: Any, placement: str = "prefix", base: Any = None) -> QTuningModel:
    """Two finished tasks at random, none set by any thread that lives."""

    def made() -> QTuningModel:
        config = QTuningConfig(**SMALL, placement=placement, task_type=family.task_type)
        model = QTuningModel(family.base_model() if base is None else base, config)
        for name in NAMES:
            model.start_task(name, 3)
            with torch.no_grad():
                for parameter in model.learning.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.5)
            model.finish_task()
        model.set_task(None)
        return model.eval()

    return in_thread(made)


@torch.no_grad()
def answer(model: QTuningModel, inputs: dict[str, Tensor], *names: str | None, **kwargs: Any) -> Tensor:
    """Logits under a task that is set first, or under what is set."""
    for name in names:
        model.set_task(name)
    return model(**inputs, **kwargs).logits


def answers(model: QTuningModel, inputs: dict[str, Tensor]) -> dict[str | None, Tensor]:
    """What is right for each task, and for the base model alone."""
    return in_thread(
        lambda: {name: answer(model, inputs, name) for name in (*NAMES, *([None] * (not model.has_heads)))}
    )


def check(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def repeated(model: QTuningModel, inputs: dict[str, Tensor], expected: Tensor, *names: Any, **kwargs: Any) -> Any:
    def run() -> None:
        for name in names:
            model.set_task(name)
        for _ in range(ROUNDS):
            check(answer(model, inputs, **kwargs), expected)

    return run


# Threads


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_thread_computes_under_the_task_that_it_has_set(family: Any, placement: str) -> None:
    model, inputs = two_tasks(family, placement), family.batch()
    right = answers(model, inputs)
    assert not torch.allclose(right["first"], right["second"], atol=1e-3)
    at_once(*(repeated(model, inputs, expected, name) for name, expected in right.items()))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_task_names_beside_set_tasks_and_direct_calls_of_the_base_model(families: Any, placement: str) -> None:
    family = families["GPT-2"]
    model, inputs = two_tasks(family, placement), family.batch()
    right = answers(model, inputs)
    base = model.base_model

    def directly(name: str | None) -> Callable[[], None]:
        def run() -> None:
            model.set_task(name)
            for _ in range(ROUNDS):
                with torch.no_grad():
                    check(base(**inputs).logits, right[name])

        return run

    seen = inputs["attention_mask"].bool()

    def mixed() -> None:
        for _ in range(ROUNDS):
            check(answer(model, inputs, task_names=["second"] * 3)[seen], right["second"][seen])

    at_once(mixed, directly("first"), directly(None), repeated(model, inputs, right["second"], "second"))


@pytest.mark.parametrize("name", ["Llama", "T5"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_threads_generate_under_their_own_tasks(families: Any, name: str, placement: str) -> None:
    family = families[name]
    model, inputs = two_tasks(family, placement), family.batch()
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def written(task: str | None, call: Any = None, **kwargs: Any) -> Tensor:
        if task is not None:
            model.set_task(task)
        with torch.no_grad():
            return (call or model.generate)(**inputs, **options, **kwargs).logits[1]

    right = {task: in_thread(lambda task=task: written(task)) for task in NAMES}
    found = at_once(
        lambda: written("first"),
        lambda: written("second"),
        lambda: written("first", model.base_model.generate),
        lambda: written(None, task_names=["second"] * 3),
    )
    for mine, task in zip(found, ("first", "second", "first", "second")):
        check(mine, right[task])


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_one_thread_trains_while_others_answer(families: Any, name: str, checkpointing: bool | None) -> None:
    family = families[name]
    labels = torch.arange(3) if family.kind == "encoder" else family.batch()["input_ids"]
    histories = []

    def train(model: QTuningModel) -> list[Tensor]:
        torch.manual_seed(3)
        model.start_task("third", 3)
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses = []
        for _ in range(ROUNDS):
            optimizer.zero_grad()
            loss = model(**family.batch(), labels=labels).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    for crowd in (False, True):
        model, inputs = two_tasks(family), family.batch()
        right = answers(model, inputs)
        others = [repeated(model, inputs, right[each], each) for each in NAMES] if crowd else []
        histories.append(at_once(lambda model=model: train(model), *others)[0])
    torch.testing.assert_close(torch.stack(histories[1]), torch.stack(histories[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_backward_pass_in_another_thread_changes_no_answer(families: Any, use_reentrant: bool) -> None:
    model, inputs = two_tasks(families["Llama"]), families["Llama"].batch()
    right = answers(model, inputs)["first"]
    model.start_task("third")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()
    for _ in range(ROUNDS):
        model.set_task("third")
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        model.set_task("first")
        thread = threading.Thread(target=loss.backward, daemon=True)
        thread.start()
        while thread.is_alive():
            check(answer(model, inputs), right)


@pytest.mark.parametrize("compute", ["forward", "generate", "task_names"])
def test_after_a_keyboard_interrupt_other_threads_may_compute(families: Any, compute: str) -> None:
    model, inputs = two_tasks(families["Llama"]), families["Llama"].batch()
    right = answers(model, inputs)["first"]
    model.set_task("first")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.backbone.injector.layers[1].module.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        if compute == "generate":
            model.generate(**inputs, max_new_tokens=2)
        else:
            model(**inputs, task_names=["second"] * 3 if compute == "task_names" else None)
    hook.remove()
    check(in_thread(lambda: answer(model, inputs)), right)
    check(answer(model, inputs), right)


def test_of_two_threads_that_start_a_task_at_once_one_is_refused(
    families: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two_tasks(families["BERT"])
    slow = model.backbone.check_gradient

    def slower(*args: Any) -> None:
        slow(*args)
        time.sleep(0.1)

    monkeypatch.setattr(model.backbone, "check_gradient", slower)

    def start(name: str) -> str | None:
        try:
            model.start_task(name, 3)
        except RuntimeError as error:
            assert "is in training" in str(error)
            return None
        return name

    started = at_once(lambda: start("third"), lambda: start("fourth"))
    assert [name for name in started if name is not None] == [model.learning.task]


def test_features_under_a_task_set_it_for_no_other_thread(model: QTuningModel, inputs: dict[str, Tensor]) -> None:
    in_thread(lambda: model.set_task("first"))  # and no living thread has set one
    seen = []

    def look(*_: Any) -> None:
        seen.append(in_thread(lambda: (model.active_task, model.config.id2label)))

    hook = model.backbone.injector.layers[0].module.register_forward_pre_hook(look)
    for task in ("second", None):
        model.features(inputs, task=task)
    hook.remove()
    assert [name for name, _ in seen] == ["first", "first"] and model.active_task == "first"


@pytest.mark.parametrize("shares", ["BERT", "GPT-2"])
def test_models_that_share_a_config_may_compute_in_two_threads(families: Any, shares: str) -> None:
    family = families[shares]
    base, inputs = family.base_model(), family.batch()
    other = type(base)(base.config).eval()
    models = [two_tasks(family, base=each) for each in (base, other)]
    right = [answers(model, inputs)["second"] for model in models]
    assert models[0].backbone.injector.lock is models[1].backbone.injector.lock
    assert models[0].backbone.injector.lock is not two_tasks(family).backbone.injector.lock

    def switching(model: QTuningModel, expected: Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(ROUNDS):
                check(answer(model, inputs, None, "second"), expected)

        return run

    at_once(*(switching(model, expected) for model, expected in zip(models, right)))


# A thread that has set no task


@pytest.fixture
def model(families: Any) -> QTuningModel:
    return two_tasks(families["BERT"])


@pytest.fixture
def inputs(families: Any) -> dict[str, Tensor]:
    return families["BERT"].batch()


def test_what_was_set_at_the_start_holds_in_worker_threads(model: QTuningModel, inputs: dict[str, Tensor]) -> None:
    right = answers(model, inputs)
    for name in NAMES:
        model.set_task(name)
        assert in_thread(lambda: model.active_task) == name
        check(in_thread(lambda: answer(model, inputs)), right[name])


def test_what_a_thread_set_that_has_ended_holds_until_another_sets_one(model: QTuningModel) -> None:
    for name in ("first", "second"):
        in_thread(lambda name=name: model.set_task(name))  # as cells of a notebook may
        assert model.active_task == name
    model.set_task("first")
    in_thread(lambda: model.set_task("second"))
    assert model.active_task == in_thread(lambda: model.active_task) == "first"


def test_where_living_threads_disagree_one_that_set_none_is_refused(
    model: QTuningModel, inputs: dict[str, Tensor]
) -> None:
    right = answers(model, inputs)
    model.set_task("first")
    is_set, leave = threading.Event(), threading.Event()

    def other() -> None:
        model.set_task("second")
        is_set.set()
        leave.wait(DEADLINE)

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    assert is_set.wait(DEADLINE)
    for refused in (lambda: answer(model, inputs), lambda: model.base_model(**inputs), lambda: model.active_task):
        with pytest.raises(RuntimeError, match=r"'first', 'second'.*set_task here, or pass task_names"):
            in_thread(refused)
    check(in_thread(lambda: answer(model, inputs, task_names=["second"] * 3)), right["second"])
    check(in_thread(lambda: answer(model, inputs, "second")), right["second"])
    assert torch.equal(in_thread(lambda: model.features(inputs, task="second")), model.features(inputs, task="second"))
    with pytest.raises(RuntimeError, match="'second' is set"):
        model.remove_task("second")
    check(answer(model, inputs), right["first"])
    leave.set()
    thread.join(DEADLINE)
    assert in_thread(lambda: model.active_task) == "first"


def test_the_traceback_of_an_error_keeps_no_task_set(model: QTuningModel, inputs: dict[str, Tensor]) -> None:
    model.set_task("first")
    with pytest.raises(ValueError, match="input_ids") as caught:
        model.features({}, task="second")
    model.set_task("second")
    assert in_thread(lambda: model.active_task) == "second" and caught.tb is not None


def test_a_task_that_is_finished_is_finished_for_all(model: QTuningModel, inputs: dict[str, Tensor]) -> None:
    model.start_task("third", 3)
    started, finished = threading.Event(), threading.Event()

    def other() -> Tensor:
        model.set_task("third")
        started.set()
        finished.wait(DEADLINE)
        return answer(model, inputs)

    def finish() -> Tensor:
        started.wait(DEADLINE)
        model.finish_task()
        finished.set()
        return answer(model, inputs)

    check(*at_once(other, finish))


def test_after_detach_no_thread_has_a_task(model: QTuningModel, inputs: dict[str, Tensor]) -> None:
    model.set_task("first")
    in_thread(model.detach)
    assert model.active_task is None
    with torch.no_grad():
        plain = model.base_model(**inputs).last_hidden_state
        assert torch.equal(model(**inputs).last_hidden_state, plain)


def test_hooks_are_on_the_base_model_only_while_a_task_is_set(model: QTuningModel, inputs: dict[str, Tensor]) -> None:
    base = model.base_model

    def hooks() -> int:
        return len(base._forward_hooks)

    assert hooks() == 0
    model.set_task("first")
    assert hooks() == 1
    model.features(inputs, task=None)
    assert hooks() == 1
    model.set_task(None)
    assert hooks() == 0
    model.set_task("first")
    with pytest.raises(ValueError, match="input_ids"):
        base()
    # The error has left the lock free:
    check(in_thread(lambda: answer(model, inputs)), answer(model, inputs))


# Asyncio


def test_each_asyncio_task_computes_under_the_task_that_it_has_set(
    model: QTuningModel, inputs: dict[str, Tensor]
) -> None:
    right = answers(model, inputs)

    async def serve(name: str) -> None:
        model.set_task(name)
        for _ in range(ROUNDS):
            await asyncio.sleep(0)
            check(answer(model, inputs), right[name])
            check(await asyncio.to_thread(answer, model, inputs), right[name])

    async def main() -> None:
        await asyncio.gather(*(serve(name) for name in NAMES * 2))

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


def test_an_asyncio_task_cannot_compute_within_a_block_of_another(
    model: QTuningModel, inputs: dict[str, Tensor]
) -> None:
    right = answers(model, inputs)

    async def main() -> None:
        inside = asyncio.Event()

        async def other() -> None:
            await inside.wait()
            with pytest.raises(RuntimeError, match="another asyncio task of this thread is inside a block"):
                answer(model, inputs, task_names=["first"] * 3)

        waiting = asyncio.create_task(other())
        with model.using(["second"] * 3, 3):
            inside.set()
            await waiting
        check(answer(model, inputs, task_names=["first"] * 3), right["first"])

    asyncio.run(asyncio.wait_for(main(), DEADLINE))


# Compiled


@pytest.fixture
def compiled(model: QTuningModel) -> Iterator[Any]:
    torch._dynamo.reset()
    yield torch.compile(model, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


def test_compiled_code_serves_threads_of_one_task_and_others_are_refused(
    model: QTuningModel, inputs: dict[str, Tensor], compiled: Any
) -> None:
    right = answers(model, inputs)
    for name in NAMES:
        model.set_task(name)
        check(answer(compiled, inputs), right[name])
        check(in_thread(lambda: answer(compiled, inputs)), right[name])
    in_thread(lambda: model.set_task("second"))
    for refused in (
        lambda: model.set_task("first"),
        lambda: answer(model, inputs, task_names=["first"] * 3),
        lambda: model.features(inputs, task=None),
    ):
        with pytest.raises(RuntimeError, match=r"the model was compiled.*has set task 'second'"):
            in_thread(refused)
    check(answer(compiled, inputs), right["second"])
    assert torch.equal(answer(model, inputs, task_names=["first"] * 3), answer(model, inputs, task_names=["first"] * 3))


# Copies


def test_a_copy_has_the_task_of_the_thread_that_makes_it(model: QTuningModel, inputs: dict[str, Tensor]) -> None:
    right = answers(model, inputs)
    context = contextvars.copy_context()
    context.run(model.set_task, "first")
    model.set_task("second")
    copied = copy.deepcopy(model)
    assert copied.active_task == in_thread(lambda: copied.active_task) == "second"
    copied.set_task("first")
    check(answer(copied, inputs), right["first"])
    check(answer(model, inputs), right["second"])
    assert context.run(lambda: model.active_task) == "first"
