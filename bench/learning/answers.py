"""The answers to the questions that bench/learning.md asks with a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from qtuning_fast.bench.learning.arms import PARTS, START, START_MIXED
from qtuning_fast.bench.learning.summary import BASE, Estimate, Results, difference, points

Found = Mapping[tuple[str, int], Results]
"""Results by stream and number of shots."""


@dataclass(frozen=True)
class Question:
    """A question with a threshold.

    Attributes:
        words: the question.
        stream, shots: where it is asked.
        wanted: what counts as a yes, in words.
        against: the arms and linear classifiers that the arm is compared with.
        at_least: the difference in points that it must have to each.
        surely: whether each interval must exclude 0.
        arm: which arm is asked about.
    """

    words: str
    stream: str
    shots: int
    wanted: str
    against: tuple[str, ...]
    at_least: float
    surely: bool = False
    arm: str = START


def _related(shots: int) -> tuple[Question, ...]:
    pays = "3 points, and intervals without 0"
    words = f"Related tasks, {shots} shots: does the start help?"
    worth = f"Related tasks, {shots} shots: is it worth more than a linear classifier?"
    return (
        Question(words, "related", shots, pays, (BASE, "prompt-per-task"), 3, surely=True),
        Question(worth, "related", shots, "not below", ("transferred",), 0),
    )


QUESTIONS = (
    *_related(4),
    *_related(16),
    Question("Unrelated tasks, 16 shots: is it harmless?", "unrelated", 16, "0.5 points below at most", (BASE,), -0.5),
    Question("Fifteen tasks, 16 shots: do prompts pay?", "offline-15", 16, "2 points", ("probe",), 2),
    Question("Fifteen tasks: are mixed heads harmless?", "offline-15", 16, "not below", (START,), 0, arm=START_MIXED),
    Question(
        *("Unrelated tasks: are mixed heads harmless?", "unrelated", 16, "0.5 points below at most", (START,), -0.5),
        arm=START_MIXED,
    ),
)


@dataclass(frozen=True)
class Answer:
    """What the study says to a question.

    Attributes:
        words: the question.
        wanted: what counts as a yes.
        found: what was found.
        yes: whether that is one.
        draws: how many say so.
        declared: how many shall.
    """

    words: str
    wanted: str
    found: str
    yes: bool
    draws: int
    declared: int

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The row of a table."""
        answer = ("yes" if self.yes else "no") if self.draws else "open"
        if self.draws < self.declared:
            answer += " so far" * bool(self.draws)
            return self.words, self.wanted, self.found, f"{answer}, {self.draws} of {self.declared} draws"
        return self.words, self.wanted, self.found, f"**{answer}**"


def answers(found: Found) -> list[Answer]:
    """Return the answer to each question, as far as the results go."""
    return [*(_answer(question, found) for question in QUESTIONS), _steps(found)]


def _answer(question: Question, found: Found) -> Answer:
    results = found.get((question.stream, question.shots), Results([]))
    ours = results.scores(question.arm)
    against = {name: difference(ours, results.scores(name)) for name in question.against}
    known = [each for each in against.values() if each is not None]
    complete = len(known) == len(against)
    return Answer(
        question.words,
        question.wanted,
        "; ".join(f"{points(each)} against `{name}`" for name, each in against.items()) if complete else "–",
        complete and all(_enough(question, each) for each in known),
        min(each.draws for each in known) if complete else 0,
        _declared(question.stream, question.shots, question.arm),
    )


def _enough(question: Question, found: Estimate) -> bool:
    return 100 * found.mean >= question.at_least and (found.excludes_zero or not question.surely)


def _steps(found: Found) -> Answer:
    results = found.get(("related", 16), Results([]))
    ours, base = results.steps(START), results.steps(BASE)
    shared = ours.keys() & base.keys()
    mean, other = (fmean(each[draw] for draw in shared) if shared else 0.0 for each in (ours, base))
    found_words = f"{mean:.0f} against {other:.0f}" if shared else "–"
    asked = "Related tasks, 16 shots: does it save steps?"
    yes = bool(shared) and mean <= other / 2
    return Answer(asked, "half as many at most", found_words, yes, len(shared), _declared("related", 16, START))


def _declared(stream: str, shots: int, arm: str) -> int:
    """Return how many draws of an arm are declared."""
    runs = [run for part in PARTS.values() for run in part()]
    return len({run.draw for run in runs if (run.stream, run.shots, run.arm) == (stream, shots, arm)})
