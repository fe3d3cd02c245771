"""How a language model is asked about the tasks of a run: the user's templates and words for classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from qtuning_fast.lifelong.tasks import Task


def worded(tasks: Sequence[Task], templates: Sequence[str], label_words: Sequence[str]) -> list[Task]:
    r"""Return tasks with templates and label words, in place of those that they have.

    Args:
        tasks: the tasks.
        templates: each for all tasks, such as `"Review: {text}\nSentiment:"`, or `name=template` for one, which goes
            before. A backslash and an n are a new line, as a shell leaves them.
        label_words: each `class=word`, or `task/class=word` for one task's class, which goes before.

    Raises:
        ValueError: a template or a word is for no task, two are for the same, or a template has not one `{text}`.
    """
    asked = dict(_templates(tasks, templates))
    words = _words(tasks, label_words)
    return [
        replace(
            task,
            template=asked.get(task.name, task.template),
            label_words=_in_place(task, words[task.name]) if words.get(task.name) else task.label_words,
        )
        for task in tasks
    ]


def _templates(tasks: Sequence[Task], given: Sequence[str]) -> dict[str, str]:
    """Return the template of each task that gets one."""
    names = [task.name for task in tasks]
    of_all: dict[str, str] = {}
    of_one: dict[str, str] = {}
    for each in given:
        own = [name for name in names if each.startswith(f"{name}=")]
        begins = re.match(r"([\w.-]+)=", each)
        if not own and begins:
            raise ValueError(
                f"templates has {each!r}, but there is no task {begins[1]!r}: {', '.join(names)} (a template that "
                f"begins so is given to each task by name: {names[0]}={each})"
            )
        template = (each.removeprefix(f"{own[0]}=") if own else each).replace("\\n", "\n")
        for name in own[:1] or names:
            found = of_one if own else of_all
            if found.setdefault(name, template) != template:
                raise ValueError(f"templates gives task {name!r} two, {found[name]!r} and {template!r}")
    return of_all | of_one


def _words(tasks: Sequence[Task], given: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the words of each task's classes that get one."""
    of_all: dict[tuple[str, str], str] = {}
    of_one: dict[tuple[str, str], str] = {}
    for each in given:
        label, separator, word = each.rpartition("=")
        owners = [
            (task.name, name) for task in tasks for name in task.label_names if label in (name, f"{task.name}/{name}")
        ]
        if not separator or not owners:
            known = ", ".join(dict.fromkeys(name for task in tasks for name in task.label_names))
            raise ValueError(f"label_words has {each!r}; it must be class=word, for one of the classes {known}")
        for owner in owners:
            found = of_all if label == owner[1] else of_one
            if found.setdefault(owner, word) != word:
                task, name = owner
                raise ValueError(f"label_words gives {name!r} of task {task!r} two, {found[owner]!r} and {word!r}")
    words = of_all | of_one
    return {task.name: {name: word for (owner, name), word in words.items() if owner == task.name} for task in tasks}


def _in_place(task: Task, words: dict[str, str]) -> list[str]:
    return [words.get(name, before) for name, before in zip(task.label_names, task.answers)]
