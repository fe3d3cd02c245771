"""Templates and words that a user gives reach the tasks that they name, or are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qtuning_fast.lifelong.data.wording import worded
from qtuning_fast.lifelong.tasks import Examples, Task

EXAMPLES = Examples(["a text"], [0])
FILMS = Task("films", ["bad", "good"], EXAMPLES, EXAMPLES, EXAMPLES, "", template="Film: {text}")
MAIL = Task("mail", ["good", "spam_mail"], EXAMPLES, EXAMPLES, EXAMPLES, "")
TASKS = [FILMS, MAIL]


def test_nothing_given_changes_nothing() -> None:
    assert worded(TASKS, (), ()) == TASKS


def test_a_template_is_for_all_tasks_or_for_one() -> None:
    assert [task.template for task in worded(TASKS, [r"Text: {text}\nClass:"], ())] == ["Text: {text}\nClass:"] * 2
    assert [task.template for task in worded(TASKS, ["mail=Mail: {text}"], ())] == ["Film: {text}", "Mail: {text}"]
    both = worded(TASKS, ["mail=Mail: {text}", "films=a = {text}"], ())
    assert [task.template for task in both] == ["a = {text}", "Mail: {text}"]


def test_a_word_is_for_all_classes_of_a_name_or_for_one_tasks() -> None:
    found = worded(TASKS, (), ["good=fine"])
    assert [task.answers for task in found] == [["bad", "fine"], ["fine", "spam mail"]]
    found = worded(TASKS, (), ["mail/good=wanted"])
    assert [task.answers for task in found] == [["bad", "good"], ["wanted", "spam mail"]]
    assert found[0].label_words is None


def test_what_is_for_one_task_goes_before_what_is_for_all() -> None:
    for templates in (["A: {text}", "mail=B: {text}"], ["mail=B: {text}", "A: {text}"]):
        assert [task.template for task in worded(TASKS, templates, ())] == ["A: {text}", "B: {text}"]
    for words in (["good=a", "mail/good=b"], ["mail/good=b", "good=a"]):
        assert [task.answers for task in worded(TASKS, (), words)] == [["bad", "a"], ["b", "spam mail"]]


def test_the_text_alone_is_no_template() -> None:
    assert [task.template for task in worded(TASKS, ["{text}"], ())] == [None, None]


def test_a_class_may_be_called_as_another_tasks_is_spelled() -> None:
    odd = replace(MAIL, name="odd", label_names=["films/good", "other"])
    assert worded([odd], (), ["films/good=a"])[0].answers == ["a", "other"]


@pytest.mark.parametrize(
    ("templates", "label_words", "message"),
    [
        (["nothing"], [], r"'films': template is 'nothing'; it must have {text} in it once"),
        (["{text} {text}"], [], "it must have {text} in it once"),
        (["music=Song: {text}"], [], "'music=Song: {text}', but there is no task 'music': films, mail"),
        (["A: {text}", "B: {text}"], [], "templates gives task 'films' two, 'A: {text}' and 'B: {text}'"),
        (["mail=A: {text}", "mail=B: {text}"], [], "templates gives task 'mail' two"),
        (["Q={text}"], [], "there is no task 'Q': films, mail .* by name: films=Q={text}"),
        ([], ["good"], "label_words has 'good'; it must be class=word"),
        ([], ["ugly=bad"], "label_words has 'ugly=bad'; .* one of the classes bad, good, spam_mail"),
        ([], ["films/spam_mail=x"], "label_words has 'films/spam_mail=x'"),
        ([], ["films/good=a", "films/good=b"], "label_words gives 'good' of task 'films' two, 'a' and 'b'"),
        ([], ["good=a", "good=b"], "label_words gives 'good' of task 'films' two, 'a' and 'b'"),
        ([], ["good="], "'films': label_words is"),
    ],
)
def test_what_is_wrong_is_named(templates: list[str], label_words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        worded(TASKS, templates, label_words)
