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
        templates: each for all tasks, such as `"Review: {text}\nSentiment:"`, or `name=template` for one. A backslash
            and an n are a new line, as a shell leaves them.
        label_words: each `class=word`, or `task/class=word` where only one task's class is meant.

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
    found: dict[str, str] = {}
    for each in given:
        own = [name for name in names if each.startswith(f"{name}=")]
        begins = re.match(r"([\w.-]+)=", each)
        if not own and begins:
            raise ValueError(f"templates has {each!r}, but there is no task {begins[1]!r}: {', '.join(names)}")
        template = (each.removeprefix(f"{own[0]}=") if own else each).replace("\\n", "\n")
        for name in own[:1] or names:
            if found.setdefault(name, template) != template:
                raise ValueError(f"templates gives task {name!r} two, {found[name]!r} and {template!r}")
    return found


def _words(tasks: Sequence[Task], given: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the words of each task's classes that get one."""
    found: dict[str, dict[str, str]] = {task.name: {} for task in tasks}
    for each in given:
        label, separator, word = each.rpartition("=")
        owners = [
            (task.name, name) for task in tasks for name in task.label_names if label in (name, f"{task.name}/{name}")
        ]
        if not separator or not owners:
            known = ", ".join(dict.fromkeys(name for task in tasks for name in task.label_names))
            raise ValueError(f"label_words has {each!r}; it must be class=word, for one of the classes {known}")
        for task, name in owners:
            if found[task].setdefault(name, word) != word:
                raise ValueError(f"label_words gives {name!r} of task {task!r} two, {found[task][name]!r} and {word!r}")
    return found


def _in_place(task: Task, words: dict[str, str]) -> list[str]:
    return [words.get(name, before) for name, before in zip(task.label_names, task.answers)]
