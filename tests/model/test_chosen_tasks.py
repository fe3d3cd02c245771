"""Which task a context has: its own, else that of the others."""

from __future__ import annotations

from contextvars import Context, copy_context

import pytest

from qtuning_fast.model.chosen_tasks import ChosenTasks, SetTask

FIRST, SECOND, LIVE = SetTask("first"), SetTask("second"), SetTask("first", is_live=True)


def in_new_context(chosen: ChosenTasks, task: SetTask | None) -> Context:
    """A context that has set this task, and lives as long as somebody holds it."""
    context = Context()
    context.run(chosen.set_mine, task)
    return context


@pytest.fixture
def chosen() -> ChosenTasks:
    return ChosenTasks()


def test_each_context_has_what_it_set_and_a_copy_of_it_too(chosen: ChosenTasks) -> None:
    chosen.set_mine(FIRST)
    other = in_new_context(chosen, SECOND)
    assert chosen.mine is FIRST and other.run(lambda: chosen.mine) is SECOND
    assert copy_context().run(lambda: chosen.mine) is FIRST
    assert chosen.living() == [FIRST, SECOND] and chosen.living(but_mine=True) == [SECOND]


def test_a_context_that_set_none_has_that_of_the_others_if_they_agree(chosen: ChosenTasks) -> None:
    assert chosen.mine is None
    others = [in_new_context(chosen, FIRST)]
    assert chosen.mine is FIRST
    others.append(in_new_context(chosen, SetTask("first")))
    assert chosen.mine is not None and chosen.mine.name == "first"
    others.append(in_new_context(chosen, None))
    with pytest.raises(RuntimeError, match="different tasks, 'first', None, and"):
        _ = chosen.mine
    others.pop()  # that context has ended
    assert chosen.mine is not None and chosen.mine.name == "first"


def test_a_live_task_is_another_one(chosen: ChosenTasks) -> None:
    others = [in_new_context(chosen, each) for each in (FIRST, LIVE)]
    with pytest.raises(RuntimeError, match="set_task"):
        _ = chosen.mine
    del others[0]
    assert chosen.mine is LIVE


def test_the_last_task_stays_when_all_contexts_have_ended(chosen: ChosenTasks) -> None:
    for each in (FIRST, SECOND):
        in_new_context(chosen, each)
    assert chosen.living() == [] and chosen.mine is SECOND


def test_what_was_set_before_a_block_is_set_after_it(chosen: ChosenTasks) -> None:
    other = in_new_context(chosen, SECOND)
    with pytest.raises(KeyError), chosen.kept():
        chosen.set_mine(FIRST)
        assert chosen.mine is FIRST and Context().run(lambda: chosen.mine) is SECOND
        raise KeyError
    assert chosen.mine is SECOND and chosen.last is SECOND and chosen.living() == [SECOND]
    del other


def test_a_task_replaces_those_of_its_name_in_all_contexts(chosen: ChosenTasks) -> None:
    others = [in_new_context(chosen, each) for each in (FIRST, SECOND, LIVE, None)]
    new = SetTask("first")
    chosen.replace("first", new)
    assert [each.run(lambda: chosen.mine) for each in others] == [new, SECOND, new, None]
