"""HTTP in front of an engine in this process: right answers, refusals that name the field, no 500 for bad requests."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("fastapi", reason="serving needs FastAPI: pip install 'qtuning_fast[serve]'")

from fastapi.testclient import TestClient

from qtuning_fast.serving import gateway
from qtuning_fast.serving.engine import Engine
from qtuning_fast.serving.keys import Keys
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.schema import Asked, Refused

LIMITS = ServingOptions(max_texts=4, max_characters=200, max_adapter_mb=1, timeout=5.0)


class Here:
    """A backend in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.ready, self.seconds = engine, True, 0.0

    async def answer(self, asked, timeout):
        self.seconds = timeout
        return self.engine.answer(asked)

    async def call(self, method, *arguments):
        return getattr(self.engine, method)(*arguments)

    async def is_ready(self):
        return self.ready


class Counted:
    def __init__(self):
        self.requests, self.texts = [], []

    def counting(self):
        return gateway.Counting(lambda *each: self.requests.append(each), self.texts.extend)


@pytest.fixture
def counted():
    return Counted()


@pytest.fixture
def backend(engine: Engine) -> Here:
    return Here(engine)


@pytest.fixture
def client(backend: Here, counted: Counted) -> TestClient:
    app = gateway.build(backend, LIMITS, Keys(anyone_administrates=True), counted.counting())
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def form(sent):
    """What is sent, as a form."""
    files = {"index": sent.index, "tensors": sent.tensors, "statistics": sent.statistics}
    data = {"name_in_index": sent.name_in_index, "label_words": sent.label_words, "template": sent.template}
    return {
        "files": {name: (name, content) for name, content in files.items() if content is not None},
        "data": {name: value for name, value in data.items() if value is not None},
    }


def fields(response):
    return [each["field"] for each in response.json()["detail"]]


def test_answers_are_the_engines_in_order(client, backend, counted):
    texts = ["the red one", "a cat was old", "a very new dog"]
    body = client.post("/v1/answers", json={"texts": texts, "task": "animals"}).json()
    replies = backend.engine.answer([Asked(text, "animals") for text in texts])
    assert body == {"answers": [each.model_dump() for each in replies]}
    body = client.post("/v1/answers", json={"texts": texts, "top_k": 2, "timeout": 2.5}).json()
    assert [each["inferred"]["others"] != [] for each in body["answers"]] == [True] * 3 and backend.seconds == 2.5
    client.post("/v1/answers", json={"texts": texts, "timeout": 99})
    assert backend.seconds == LIMITS.timeout
    assert len(counted.texts) == 9 and [each[:2] for each in counted.requests] == [("/v1/answers", 200)] * 3


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"texts": ["a"] * 5}, 422, "texts"),
        ({"texts": ["a", "b" * 201]}, 422, "texts.1"),
        ({"texts": ["a"], "task": "cars"}, 404, "task"),
        ({"texts": []}, 422, "texts"),
        ({"texts": ["a", " "]}, 422, "texts.1"),
        ({"texts": {"a": "b"}}, 422, "texts"),
        ({"texts": ["a"], "top_k": 9}, 422, "top_k"),
        ({"texts": ["a"], "timeout": -1}, 422, "timeout"),
        ({"texts": ["a"], "colour": "red"}, 422, "colour"),
        ([], 422, "body"),
        (None, 422, "body"),
        ("texts", 422, "body"),
    ],
)
def test_wrong_questions_name_the_field(body, status, field, client):
    response = client.post("/v1/answers", json=body)
    assert response.status_code == status and fields(response) == [field], response.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"texts":' + b"9" * 5000 + b"}",
        b'{"texts": ["\\ud800"]}',
        b'{"\\udfff": 1, "texts": ["a"]}',
        b'{"texts": ["a"], "task": "\\ud800"}',
        b'{"texts": ["a"], "timeout": NaN}',
        b'{"texts": ["a"], "timeout": 1e999}',
        b'{"texts": ["a"], "texts": 3}',
        b'{"texts": ["a\\u0000"], "task": "cars"}',
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/form-data", "application/x", ""])
def test_no_body_makes_the_server_fail(body, kind, client):
    response = client.post("/v1/answers", content=body, headers={"content-type": kind})
    assert 400 <= response.status_code < 500, response.text
    assert fields(response)


def test_a_text_of_another_script_and_a_null_character_are_texts(client):
    response = client.post("/v1/answers", json={"texts": ["红色的猫 🐈", "a\x00b", "\u202e"], "task": "colours"})
    assert response.status_code == 200 and len(response.json()["answers"]) == 3


def test_tasks_come_and_go(client, sending):
    assert client.put("/v1/tasks/new/one", **form(sending("warm"))).status_code == 201
    assert client.put("/v1/tasks/new/one", **form(sending("colours"))).status_code == 200
    described = client.get("/v1/tasks/new/one").json()
    assert described["labels"] == client.get("/v1/tasks/colours").json()["labels"] and described["is_added"]
    two = client.get("/v1/tasks", params={"limit": 2}).json()["tasks"]
    assert [each["name"] for each in two] == ["animals", "colours"]
    assert client.get("/v1/tasks", params={"after": "colours"}).json()["total"] == 4
    assert client.post("/v1/answers", json={"texts": ["a cat"], "task": "new/one"}).status_code == 200
    assert client.delete("/v1/tasks/new/one").json() == {"status": "removed"}
    for response in (client.delete("/v1/tasks/new/one"), client.get("/v1/tasks/new/one")):
        assert response.status_code == 404 and fields(response) == ["name"]


def test_wrong_adapters_name_the_part(client, sending):
    good = form(sending())
    assert fields(client.put("/v1/tasks/x", data={"index": "text", "tensors": "text"})) == ["index", "tensors"]
    assert fields(client.put("/v1/tasks/x", files={"index": good["files"]["index"]})) == ["tensors"]
    assert fields(client.put("/v1/tasks/x", **form(sending(tensors=b"x")))) == ["tensors"]
    assert fields(client.put("/v1/tasks/x", **form(sending(index=b"x")))) == ["index"]
    assert fields(client.put("/v1/tasks/infer", **good)) == ["name"]
    assert fields(client.put("/v1/tasks/x", **form(sending(label_words="[")))) == ["label_words"]
    large = client.put("/v1/tasks/x", **form(sending(tensors=os.urandom(2**20 + 2**18))))
    assert large.status_code == 413 and fields(large) == ["body"]
    assert client.get("/v1/tasks").json()["total"] == 3


def test_health_and_pages(client, backend):
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready"}
    backend.ready = False
    response = client.get("/health/ready")
    assert response.status_code == 503 and int(response.headers["Retry-After"]) > 0
    assert "<form" in client.get("/").text and "/v1/answers" in client.get("/docs").text
    for path in ("/redoc", "/nowhere", "/v1/", "/v1/answers/x"):
        assert client.get(path).status_code == 404 and fields(client.get(path)) == ["path"]
    assert client.get("/v1/answers").status_code == 405 and fields(client.delete("/v1/answers")) == ["path"]


def test_refusals_of_a_backend_are_responses(client, backend, monkeypatch):
    async def full(asked, timeout):
        raise Refused(503, "server", "the queue is full; try again", 1)

    async def broken(asked, timeout):
        raise KeyError("a secret")

    monkeypatch.setattr(backend, "answer", full)
    response = client.post("/v1/answers", json={"texts": ["a"]})
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1") and fields(response) == ["server"]
    monkeypatch.setattr(backend, "answer", broken)
    response = client.post("/v1/answers", json={"texts": ["a"]})
    assert response.status_code == 500 and fields(response) == ["server"] and "secret" not in response.text


def test_keys_are_on_the_page_of_the_api(backend, counted):
    keys = Keys(asking=(b"digest",))
    paths = gateway.build(backend, LIMITS, keys, counted.counting()).openapi()["paths"]
    assert paths["/v1/answers"]["post"]["security"] == [{"key": []}] and "security" not in paths["/"]["get"]
