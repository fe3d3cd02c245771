"""Answers follow from the thresholds that were declared."""

from typing import Any

import pytest

from qtuning_fast.bench.learning.answers import answers
from qtuning_fast.bench.learning.summary import Results


def records(arm: str, values: list[float], first_steps: int = 40) -> list[dict[str, Any]]:
    curve = [[0, 0.1], [first_steps, 0.7], [60, 0.72]]
    task = {"best_step": 60, "validation_curve": curve}
    return [
        {
            "arm": arm,
            "draw": draw,
            "accuracy": {"task_adapter": [0.9, value], "live_queue": [0.9, value]},
            "per_task": [task, task],
        }
        for draw, value in enumerate(values)
    ]


NOISE = [0.01 * (-1) ** draw for draw in range(10)]


@pytest.mark.parametrize(
    ("gains", "yes"),
    [
        ([0.031 + noise for noise in NOISE], True),
        ([0.029 + noise for noise in NOISE], False),  # sure, but small
        ([0.04 + 10 * noise for noise in NOISE], False),  # large, but unsure
    ],
)
def test_a_gain_must_be_large_and_sure_against_both(gains: list[float], yes: bool) -> None:
    ours = records("start", [0.7 + gain for gain in gains], first_steps=20)
    base = records("from-random", [0.7] * 10)
    found = {("related", 16): Results([*ours, *base, *records("prompt-per-task", [0.6] * 10)])}
    answer = next(each for each in answers(found) if each.words == "Related tasks, 16 shots: does the start help?")
    assert (answer.yes, answer.draws, answer.cells[-1]) == (yes, 10, "**yes**" if yes else "**no**")
    turned = {
        ("related", 16): Results([*ours, *records("from-random", [0.6] * 10), *records("prompt-per-task", [0.7] * 10)])
    }
    assert next(each for each in answers(turned) if each.words == answer.words).yes == yes


def test_a_question_is_open_until_all_that_it_compares_is_there() -> None:
    some = {("related", 16): Results([*records("start", [0.8] * 4), *records("from-random", [0.7] * 3)])}
    by_words = {each.words: each for each in answers(some)}
    assert by_words["Related tasks, 16 shots: does the start help?"].cells[-1] == "open, 0 of 10 draws"
    assert by_words["Unrelated tasks, 16 shots: is it harmless?"].cells[2:] == ("–", "open, 0 of 10 draws")
    assert by_words["Fifteen tasks, 16 shots: do prompts pay?"].declared == 5


@pytest.mark.parametrize(("first", "yes"), [(20, True), (40, False)])
def test_steps_are_to_be_halved(first: int, yes: bool) -> None:
    found = {("related", 16): Results([*records("start", [0.8] * 3, first), *records("from-random", [0.7] * 3)])}
    answer = next(each for each in answers(found) if "steps" in each.words)
    assert (answer.yes, answer.found) == (yes, f"{first} against 40")
    assert answer.cells[-1] == f"{'yes' if yes else 'no'} so far, 3 of 10 draws"
