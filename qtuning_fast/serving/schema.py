"""What a request holds and what an answer says, checked by pydantic; the OpenAPI page derives from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from qtuning_fast.serving.options import ServingOptions

MOST_CHARACTERS_OF_A_NAME = 200
MOST_TASKS_ASKED = 8
_VERSION = "the start of a SHA-256 over its adapter, statistics, labels, words and template."

TaskName = Annotated[str, StringConstraints(min_length=1, max_length=MOST_CHARACTERS_OF_A_NAME)]


def unreadable(text: str) -> str | None:
    """Why no tokenizer reads a text; None if it does."""
    if not text.strip():
        return "is empty; give a text to answer"
    if text != printable(text):
        return "has half of a surrogate pair, which is no character"
    return None


def printable(text: str) -> str:
    """A text that UTF-8 can encode: halves of surrogate pairs, which JSON lets through, are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _readable(text: str) -> str:
    if wrong := unreadable(text):
        raise ValueError(f"it {wrong}")
    return text


Text = Annotated[str, AfterValidator(_readable), Field(json_schema_extra={"pattern": "\\S"})]


class Question(BaseModel):
    """Texts to answer, under one task or under the one that each seems to be of."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: list[Text] = Field(min_length=1, description="The texts; each gets one answer, in this order.")
    task: TaskName | None = Field(None, description="The task of all texts; left out, it is inferred for each.")
    top_k: int = Field(
        1, ge=1, le=MOST_TASKS_ASKED, description="Without `task`: ask the adapters of so many tasks, the likeliest."
    )
    timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds after which the answer is of no use; then 504."
    )

    def check(self, options: ServingOptions) -> None:
        """Refuse what is beyond the limits of this server.

        Raises:
            Refused: with 422 and the field.
        """
        if len(self.texts) > options.max_texts:
            raise Refused(422, "texts", f"there are {len(self.texts)} texts; a request may have {options.max_texts}")
        for place, text in enumerate(self.texts):
            if len(text) > options.max_characters:
                said = f"it has {len(text)} characters; a text may have {options.max_characters}"
                raise Refused(422, f"texts.{place}", said)
        if self.task is not None and self.top_k != 1:
            raise Refused(422, "top_k", "it is for a task that is inferred, but `task` names it; leave out one of them")


class OtherTask(BaseModel):
    """Another task that a text may be of."""

    task: str
    probability: float


class Inference(BaseModel):
    """How sure it is which task a text is of."""

    task_probability: float = Field(description="That the text is of the task.")
    probability: float = Field(description="That both task and label are right; for one label of several.")
    is_known: bool = Field(description="Whether the text seems to be of any known task.")
    others: list[OtherTask] = Field(description="The next likeliest tasks, three at most.")


class Answer(BaseModel):
    """The answer to one text."""

    task: str
    adapter: str = Field(description=f"Which version of the task answered: {_VERSION}")
    problem_type: str
    labels: list[str] = Field(description="The most probable label, or those above one half; none of a number.")
    outputs: dict[str, float] = Field(description="The probability of each label, or the numbers that are predicted.")
    words: str = Field(description="The answer in words.")
    inferred: Inference | None = Field(None, description="Set if the request named no task.")


class Answers(BaseModel):
    """The answers to a request, one a text, in its order."""

    answers: list[Answer]


class TaskDescription(BaseModel):
    """A task that is served."""

    name: str
    labels: list[str]
    problem_type: str
    adapter: str = Field(description=f"Its version: {_VERSION}")
    bytes: int = Field(description="Size of its adapter.")
    is_inferred: bool = Field(description="Whether it is considered for texts whose task is not named.")
    is_added: bool = Field(description="Whether its adapter was added while serving, not by the run.")


class TaskList(BaseModel):
    """Tasks by name, a part at a time."""

    tasks: list[TaskDescription]
    total: int
    next: str | None = Field(None, description="As `after` of the next request; null at the end.")


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    field: str = Field(description="Where: a field of the body, `path`, `query`, `body`, `Authorization`, or `server`.")
    message: str


class Faults(BaseModel):
    """Why a request is refused."""

    detail: list[Fault]


class State(BaseModel):
    """Whether the server runs, or can answer."""

    status: str


class Refused(Exception):  # noqa: N818  it is an answer, not a fault of the server
    """A request is refused.

    Args:
        status: the HTTP status.
        field: see `Fault`.
        message: why, and what to do.
        retry_after: seconds after which the same request may be tried again; None: not at all.
    """

    def __init__(self, status: int, field: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(status, field, message, retry_after)  # all of them, so that it can be pickled
        self.status, self.field, self.message, self.retry_after = status, field, message, retry_after

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"

    def content(self) -> dict[str, Any]:
        """The body of the response."""
        return Faults(detail=[Fault(field=self.field, message=printable(self.message))]).model_dump()


@dataclass(frozen=True)
class Asked:
    """One text to answer.

    Attributes:
        text: the text; not empty.
        task: its task; None: it is inferred.
        top_k: without a task, ask the adapters of so many tasks.
    """

    text: str
    task: str | None = None
    top_k: int = 1


Reply = Answer | Refused
"""What a text gets."""


@dataclass(frozen=True)
class SentAdapter:
    """An adapter as it arrives: what a saved model has of one task.

    Attributes:
        index: the content of `adapter_config.json`.
        tensors: that of the file which the index names for the task.
        statistics: that of the file of its statistics; None: its inputs are not recognised.
        name_in_index: the task's name in the index; None: the name that it gets here.
        label_words: a language model's words for its classes, as JSON; None: the names of the labels.
        template: what a language model reads, with `{text}` in place of the text; None: the text alone.
    """

    index: bytes
    tensors: bytes
    statistics: bytes | None = None
    name_in_index: str | None = None
    label_words: str | None = None
    template: str | None = None
