"""The engine: answers to questions of any tasks, in as few forward passes as pay, and one bad question harms no other.

It knows nothing of HTTP and nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qtuning_fast.lifelong.answers import Answering, InferredAnswer
from qtuning_fast.lifelong.data.encoded import EncodedExamples
from qtuning_fast.lifelong.evaluation import features
from qtuning_fast.lifelong.run_folder import RUN_FILE
from qtuning_fast.lifelong.saved_run import ADAPTERS, JOINT_HEAD, SavedRun, run_folder
from qtuning_fast.lifelong.tasks import Examples
from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE
from qtuning_fast.model.checked_files import CorruptFileError, read_json
from qtuning_fast.model.model import QTuningModel
from qtuning_fast.model.scoring import Answers
from qtuning_fast.serving.adapters import ServedAdapters
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.schema import (
    Answer,
    Asked,
    Inference,
    OtherTask,
    Refused,
    Reply,
    SentAdapter,
    TaskDescription,
    TaskList,
    unreadable,
)

PASS_COSTS_TOKENS = {"cpu": 32, "cuda": 8192}
"""How many tokens' worth of time a forward pass takes beside its tokens, by the type of device.

On a CPU as measured with MiniLM: 7 ms, and 0.33 ms a token, on one core. On a GPU, where starting a pass takes longest,
it is a guess.
"""

_OTHERS = 3
_JOINT = "one head over all classes answers for this run"


def check_run(run: Path) -> None:
    """Check that a folder holds a run that can be served, before anything is loaded.

    Raises:
        FileNotFoundError, ValueError: it does not, or its run reads images; the message says so.
    """
    settings = read_json(run_folder(run) / RUN_FILE)
    if settings["method"]["task_type"] == "image-classification":
        raise ValueError(f"{run} classifies images; only runs that read texts are served: use qtuning-fast predict")


class Engine:
    """The model of a run, with the adapters that come and go.

    One thread at a time may use it.

    Args:
        run: folder of the run.
        options: limits, and where added adapters are kept.

    Raises:
        FileNotFoundError, ValueError: the folder holds no run that can be served; the message says why.
    """

    def __init__(self, run: Path, options: ServingOptions) -> None:
        check_run(run)
        self._options = options
        self._saved = saved = SavedRun(run, lazy=True)
        folder = saved.folder / "served" if options.adapters is None else Path(options.adapters)
        self._adapters = ServedAdapters(
            folder,
            saved.model,
            most_tasks=options.max_tasks,
            check_words=partial(saved.encoder.encode_answers, task="sent"),
            check_template=partial(saved.encoder.check_template, task="sent"),
        )
        if self._adapters.is_changed and saved.answers_by == JOINT_HEAD:
            raise ValueError(f"{folder} changes the tasks of {run}, but {_JOINT}; remove it, or set another adapters=")
        megabyte = 2**20
        saved.model.set_memory_limits(device_bytes=options.device_mb * megabyte, host_bytes=options.host_mb * megabyte)
        self._answering = MixedAnswering(saved, self._adapters, options.batch)

    # Answering

    def answer(self, questions: Sequence[Asked]) -> list[Reply]:
        """Return an answer to each question, or why there is none; in their order."""
        try:
            self._adapters.refresh()
        except (OSError, ValueError) as error:
            return [Refused(503, "server", f"the served adapters cannot be read: {error}", 5)] * len(questions)
        return self._answers(list(questions))

    def _answers(self, questions: list[Asked]) -> list[Reply]:
        """Answer together; if that fails, halve by halve, so that an error stays with the question that causes it."""
        try:
            return self._together(questions)
        except Refused as refused:
            if len(questions) == 1:
                return [refused]
        except CorruptFileError as error:
            if len(questions) == 1:
                return [Refused(503, "server", str(error), 5)]  # its file was replaced meanwhile, or will be restored
        except Exception as error:
            if len(questions) == 1:
                return [_unanswered(questions[0], error)]
        middle = len(questions) // 2
        return self._answers(questions[:middle]) + self._answers(questions[middle:])

    @torch.no_grad()
    def _together(self, questions: list[Asked]) -> list[Reply]:
        """Answer questions of all tasks in one go: one pass for those whose task is not named, then one for all."""
        infers = any(each.task is None for each in questions) and self._saved.infers
        replies: list[Reply | None] = [self._refused(each, infers) for each in questions]
        places = [place for place, reply in enumerate(replies) if reply is None]
        if not places:
            return [reply for reply in replies if reply is not None]
        asked = [questions[place] for place in places]
        found = self._found(asked, self._encoded([each.text for each in asked]))
        for place, each, answer in zip(places, asked, found):
            replies[place] = self._reply(each, answer)
        return [reply for reply in replies if reply is not None]

    def _found(self, asked: list[Asked], encoded: EncodedExamples) -> list[InferredAnswer]:
        """Return what the adapters answer; of named tasks, too, in the form of an inferred answer."""
        found: dict[int, InferredAnswer] = {}
        pairs = [(place, each.task) for place, each in enumerate(asked) if each.task is not None]
        named, inferring = len(pairs), []
        for k in dict.fromkeys(each.top_k for each in asked if each.task is None):
            places = [place for place, each in enumerate(asked) if each.task is None and each.top_k == k]
            part = encoded.subset(places)
            if self._saved.answers_by != ADAPTERS:
                found |= dict(zip(places, self._saved.infer_encoded(part, k)))
                continue
            x = features(self._saved.model, part, self._options.batch, task=None)
            inference = self._answering.infer(self._saved.fitted(), part, x)
            to_ask = self._answering.to_ask(inference, k)
            inferring.append((places, inference, len(to_ask)))
            pairs += [(place, task) for names in to_ask for place, task in zip(places, names)]
        outputs = iter(self._asked(pairs, encoded))
        for place, task in pairs[:named]:
            found[place] = InferredAnswer(task, next(outputs), 1.0, 1.0, (), True)
        for places, inference, count in inferring:
            each_rank = [[next(outputs) for _ in places] for _ in range(count)]
            found |= dict(zip(places, self._answering.choose(inference, each_rank)))
        return [found[place] for place in range(len(asked))]

    def _asked(self, pairs: Sequence[tuple[int, str]], encoded: EncodedExamples) -> list[Tensor]:
        """Return what the adapter of each pair's task gives for the text at its place."""
        if not pairs:
            return []
        return self._answering.ask_each([task for _, task in pairs], encoded.subset([place for place, _ in pairs]))

    def _refused(self, asked: Asked, infers: bool) -> Refused | None:
        """Why a question has no answer, before anything is computed."""
        if wrong := unreadable(asked.text):
            return Refused(422, "texts", f"a text {wrong}")
        if asked.task is not None and asked.task not in self._saved.model.adapters:
            return Refused(404, "task", f"task {asked.task!r} is not served; GET /v1/tasks lists those that are")
        if asked.task is None and not infers:
            return Refused(422, "task", f"it must be named: {self._saved.no_inference}")
        if asked.task is None and asked.top_k > 1 and self._saved.answers_by != ADAPTERS:
            return Refused(422, "top_k", f"{self._saved.answers_by} answers, not several adapters; leave it out")
        return None

    def _reply(self, asked: Asked, found: InferredAnswer) -> Reply:
        task, model = found.task, self._saved.model
        if not found.output.isfinite().all():
            return _unanswered(asked, ValueError(f"the adapter of task {task!r} gives numbers that are not finite"))
        names, kind = model.label_names(task), model.problem_type(task)
        outputs = dict(zip(names, map(float, found.output)))
        labels = {SINGLE: [names[int(found.output.argmax())]], REGRESSION: []}.get(
            kind, [name for name, p in outputs.items() if p > 0.5]
        )
        inferred = None
        if asked.task is None:
            inferred = Inference(
                task_probability=found.task_probability,
                probability=found.probability,
                is_known=found.is_known,
                others=[OtherTask(task=name, probability=p) for name, p in found.runners_up[:_OTHERS]],
            )
        return Answer(
            task=task,
            adapter=self._adapters.version(task),
            problem_type=kind,
            labels=labels,
            outputs=outputs,
            words=self._saved.answer(found.output, task),
            inferred=inferred,
        )

    def _encoded(self, texts: list[str]) -> EncodedExamples:
        return self._saved.encoder.encode(Examples(texts, [0] * len(texts)))

    # Tasks

    def tasks(self, after: str | None = None, limit: int = 1000) -> TaskList:
        """Return descriptions of the tasks, by name.

        Args:
            after: only those whose name comes after this one.
            limit: so many at most.
        """
        self._adapters.refresh()
        names = sorted(self._saved.model.tasks)
        chosen = [name for name in names if after is None or name > after]
        listed, lacking = chosen[:limit], set(self._saved.left_out)
        return TaskList(
            tasks=[self._described(name, name not in lacking) for name in listed],
            total=len(names),
            next=listed[-1] if len(chosen) > limit else None,
        )

    def task(self, name: str) -> TaskDescription:
        """Return the description of a task.

        Raises:
            Refused: there is no such task.
        """
        self._adapters.refresh()
        if name not in self._saved.model.adapters:
            raise Refused(404, "name", f"task {name!r} is not served")
        return self._described(name, name not in self._saved.left_out)

    def _described(self, name: str, is_inferred: bool) -> TaskDescription:
        info = self._saved.model.adapters.entry(name).info
        return TaskDescription(
            name=name,
            labels=list(info.label_names),
            problem_type=info.problem_type,
            adapter=self._adapters.version(name),
            bytes=info.bytes,
            is_inferred=is_inferred,
            is_added=self._adapters.is_added(name),
        )

    def put(self, name: str, sent: SentAdapter) -> tuple[TaskDescription, bool]:
        """Add or replace a task; return its description and whether it was there before; see `ServedAdapters.put`."""
        self._check_may_change()
        was_there = self._adapters.put(name, sent)
        return self.task(name), was_there

    def remove(self, name: str) -> None:
        """Remove a task; see `ServedAdapters.remove`."""
        self._check_may_change()
        self._adapters.remove(name)

    def _check_may_change(self) -> None:
        if self._saved.answers_by == JOINT_HEAD:
            raise Refused(409, "name", f"{_JOINT}, so its tasks cannot be changed while serving")


class MixedAnswering(Answering):
    """Asks the adapters of several tasks in one pass.

    Args:
        saved: the run.
        adapters: its tasks, with those that were added.
        batch_size: texts a pass.
    """

    def __init__(self, saved: SavedRun, adapters: ServedAdapters, batch_size: int) -> None:
        def answers_of(task: str) -> Answers | None:
            words = adapters.label_words.get(task)
            return saved.answers_of(task) if words is None else saved.encoder.encode_answers(words, task=task)

        def as_asked(task: str, examples: EncodedExamples) -> EncodedExamples:
            if not adapters.is_added(task):
                return saved.as_asked(task, examples)
            return saved.encoder.as_asked(examples, adapters.templates.get(task))

        super().__init__(saved.model, batch_size, answers_of, as_asked)
        self._mixes, self._rows = saved.model, batch_size

    def ask_each(self, tasks: Sequence[str], examples: EncodedExamples) -> list[Tensor]:
        """Return what its task's adapter gives for each example, `[outputs]` each."""
        model = self._mixes
        if not model.has_heads:  # words are scored, others for each task
            return super().ask_each(tasks, examples)
        found: list[Tensor] = [torch.empty(0)] * len(tasks)
        for places in passes(model, tasks, lengths_of(examples), self._rows):
            names = [tasks[place] for place in places]
            (batch,) = examples.subset(places).batches(len(places), model.device)
            logits = model(**batch, task_names=names).logits.float().cpu()
            for place, name, row in zip(places, names, logits):
                kind, own = model.problem_type(name), row[: len(model.label_names(name))]
                found[place] = own.softmax(-1) if kind == SINGLE else own.sigmoid() if kind == MULTI else own
        return found


def lengths_of(examples: EncodedExamples) -> list[int]:
    """The number of tokens of each example."""
    mask = examples.columns.get("attention_mask")
    return [1] * len(examples) if mask is None else mask.sum(1).tolist()


def passes(model: QTuningModel, tasks: Sequence[str], lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Yield the places of the samples of each forward pass.

    A pass has one kind of gate and no more tasks than there are slots. It has at most `rows` samples, the longest
    first, and ends before a shorter one where the padding that this saves takes longer than another pass.
    """
    gates: dict[str, list[int]] = {}
    by_gate = {name: model.adapters.entry(name).info.gate for name in dict.fromkeys(tasks)}
    usual = next((gate for gate in by_gate.values() if gate is not None), "")  # what has no gate fits any
    for place, name in enumerate(tasks):
        gates.setdefault(by_gate[name] or usual, []).append(place)
    worth = PASS_COSTS_TOKENS.get(model.device.type, PASS_COSTS_TOKENS["cuda"])
    for places in gates.values():
        places.sort(key=lambda place: (-lengths[place], place))
        yield from _cut(places, tasks, lengths, _Limits(rows, model.slots.most, worth))


@dataclass(frozen=True)
class _Limits:
    """Of one pass: its samples, its tasks, and the tokens of padding that are worth another one."""

    rows: int
    tasks: float
    padding: int


def _cut(places: list[int], tasks: Sequence[str], lengths: Sequence[int], limits: _Limits) -> Iterator[list[int]]:
    """Cut places, the longest first, into passes."""
    part: list[int] = []
    names: set[str] = set()
    for number, place in enumerate(places):
        left = min(len(places) - number, limits.rows - len(part))
        saved = (lengths[part[0]] - lengths[place]) * left if part else 0
        full = len(part) == limits.rows or len({*names, tasks[place]}) > max(1, limits.tasks)
        if part and (full or saved > limits.padding):
            yield part
            part, names = [], set()
        part.append(place)
        names.add(tasks[place])
    if part:
        yield part


def _unanswered(asked: Asked, error: Exception) -> Refused:
    """The refusal of one question that the model cannot compute."""
    task = "" if asked.task is None else f" of task {asked.task!r}"
    if isinstance(error, torch.OutOfMemoryError):
        return Refused(503, "server", "there is no memory for this text now", 1)
    return Refused(500, "server", f"a text{task} could not be answered: {type(error).__name__}: {error}")
