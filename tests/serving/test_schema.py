"""What a request may hold, and that a refusal survives the way between processes."""

import pickle

import pytest

pytest.importorskip("pydantic")

import pydantic
from hypothesis import given
from hypothesis import strategies as st

from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.schema import Question, Refused, printable, unreadable


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "texts"),
        ({"texts": []}, "texts"),
        ({"texts": "a text"}, "texts"),
        ({"texts": [1]}, "texts"),
        ({"texts": ["a", " \n"]}, "texts"),
        ({"texts": ["\ud800"]}, "texts"),
        ({"texts": ["a"], "task": ""}, "task"),
        ({"texts": ["a"], "task": "x" * 201}, "task"),
        ({"texts": ["a"], "task": 3}, "task"),
        ({"texts": ["a"], "top_k": 0}, "top_k"),
        ({"texts": ["a"], "top_k": True}, "top_k"),
        ({"texts": ["a"], "timeout": 0}, "timeout"),
        ({"texts": ["a"], "timeout": float("nan")}, "timeout"),
        ({"texts": ["a"], "text": "b"}, "text"),
    ],
)
def test_wrong_questions_name_the_field(given, field):
    with pytest.raises(pydantic.ValidationError) as caught:
        Question(**given)
    assert {each["loc"][0] for each in caught.value.errors()} == {field}


@pytest.mark.parametrize(
    ("given", "status", "field"),
    [
        ({"texts": ["a"] * 3}, 422, "texts"),
        ({"texts": ["a", "b" * 11]}, 422, "texts.1"),
        ({"texts": ["a"], "task": "x", "top_k": 2}, 422, "top_k"),
    ],
)
def test_what_is_beyond_a_limit_is_refused(given, status, field):
    with pytest.raises(Refused) as caught:
        Question(**given).check(ServingOptions(max_texts=2, max_characters=10))
    assert (caught.value.status, caught.value.field) == (status, field)


def test_a_refusal_can_be_pickled():
    refused = pickle.loads(pickle.dumps(Refused(503, "server", "try again", 2)))
    assert (refused.status, refused.field, refused.message, refused.retry_after) == (503, "server", "try again", 2)


@given(st.text(st.characters()))
def test_what_is_said_can_be_encoded(text):
    assert printable(text).encode().decode()[:1] in {"", "\\", text[:1]}
    assert unreadable(text) is not None or text.encode()
