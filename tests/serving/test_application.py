"""A whole server on Ray, with two replicas: right answers while adapters come and go and replicas die."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="serving needs ray: pip install 'qtuning_fast[serve]'")

import aiohttp

from qtuning_fast.serving.application import app
from qtuning_fast.serving.engine import Engine
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.schema import Asked

KEY, ADMIN = "a-key-that-asks-1", "a-key-of-an-admin"
TEXTS = ["the red one", "a cat was old", "the new dog is very blue and old and new", "yellow"]
CLOSE = 1e-4  # as in test_engine.py
LIMITS = ["--replicas=2", "--threads=1", "--batch=8", "--queue=40", "--max-texts=16", "--max-adapter-mb=1"]


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("application") / "run"))


@pytest.fixture(scope="module")
def server(run: Path, serving):
    started = serving(run, *LIMITS)
    yield started
    started.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def alone(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine on the same run, in this process, without what was added."""
    return Engine(run, ServingOptions(adapters=str(tmp_path_factory.mktemp("none-added"))))


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers={"Authorization": f"Bearer {ADMIN}"})


def form(sent) -> aiohttp.FormData:
    data = aiohttp.FormData()
    for name in ("index", "tensors", "statistics"):
        if getattr(sent, name) is not None:
            data.add_field(name, getattr(sent, name), filename=name)
    data.add_field("name_in_index", sent.name_in_index)
    return data


async def ask(client: aiohttp.ClientSession, server, **question: Any) -> tuple[int, Any, Any]:
    """Return status, content and headers."""
    async with client.post(f"{server.url}/v1/answers", json=question) as response:
        return response.status, await response.json(), response.headers


async def put(client: aiohttp.ClientSession, server, name: str, sent) -> int:
    async with client.put(f"{server.url}/v1/tasks/{name}", data=form(sent)) as response:
        assert response.status in (200, 201), await response.text()
        return response.status


def is_answer(found: dict[str, Any], expected: Any) -> bool:
    right = found["task"] == expected.task and found["adapter"] == expected.adapter
    return right and found["outputs"] == pytest.approx(expected.outputs, abs=CLOSE)


async def load(server, alone: Engine, requests: int, at_once: int, during: Any = None) -> Counter[int]:
    """Ask at random, many at once; check every answer and count the statuses. Nothing may be lost."""
    draw, statuses, slots = random.Random(0), Counter[int](), asyncio.Semaphore(at_once)
    asked = [(draw.choice(TEXTS), draw.choice(["colours", "animals", "warm", None])) for _ in range(requests)]
    expected = {each: alone.answer([Asked(*each)])[0] for each in set(asked)}

    async with session() as client:

        async def one(text: str, task: str | None) -> None:
            async with slots:
                status, content, headers = await ask(client, server, texts=[text], **({"task": task} if task else {}))
            statuses[status] += 1
            if status == 200:
                assert is_answer(content["answers"][0], expected[text, task]), content
            else:
                assert status in (503, 504) and int(headers["Retry-After"]) >= 1, (status, content)

        await asyncio.gather(*(one(*each) for each in asked), *([during()] if during else []))
    return statuses


def test_mixed_answers_are_those_of_an_engine_alone(server, alone):
    statuses = asyncio.run(load(server, alone, requests=120, at_once=12))
    assert statuses == {200: 120}


def test_a_long_request_is_answered_in_order(server, alone):
    async def scenario():
        async with session() as client:
            return await ask(client, server, texts=TEXTS * 4, task="animals")

    status, content, _ = asyncio.run(scenario())
    expected = alone.answer([Asked(text, "animals") for text in TEXTS]) * 4
    assert status == 200 and all(map(is_answer, content["answers"], expected)) and len(content["answers"]) == 16


def test_a_full_queue_refuses_at_once(server, alone):
    statuses = asyncio.run(load(server, alone, requests=400, at_once=400))
    assert statuses[200] > 0 and statuses[503] > 0 and set(statuses) == {200, 503}


def test_a_request_that_takes_too_long_is_given_up(server):
    async def scenario():
        async with session() as client:
            return await ask(client, server, texts=TEXTS, timeout=1e-5)

    status, content, headers = asyncio.run(scenario())
    assert status == 504 and content["detail"][0]["field"] == "server" and headers["Retry-After"] == "1"


def request(server, path: str, key: str | None, method: str = "GET", body: bytes | None = None) -> tuple[int, Any]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    asked = urllib.request.Request(server.url + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_keys_and_limits_hold(server):
    assert request(server, "/v1/tasks", None)[0] == request(server, "/v1/tasks", KEY[:-1])[0] == 401
    assert request(server, "/v1/tasks", KEY)[1]["total"] == 3
    assert request(server, "/v1/tasks/warm", KEY, "DELETE")[0] == 403
    assert request(server, "/v1/tasks/new", ADMIN, "PUT", b"x" * 2**21)[0] == 413
    assert request(server, "/v1/answers", KEY, "POST", b"x" * (2**20 + 1))[0] == 413
    assert request(server, "/v1/answers", KEY, "POST", b"garbage")[0] == 422
    assert request(server, "/health/live", None) == (200, {"status": "live"})
    assert request(server, "/health/ready", None) == (200, {"status": "ready"})


def test_adapters_come_and_go_under_load(server, alone, sending):
    """Each answer is that of the version it names, and a change that was confirmed holds on every replica."""
    sources = {alone.task(name).adapter: name for name in ("colours", "animals", "warm")}
    expected = {(source, text): alone.answer([Asked(text, source)])[0] for source in sources.values() for text in TEXTS}

    async def scenario() -> tuple[Counter[int], set[str]]:
        statuses, versions, ends = Counter[int](), set(), time.monotonic() + 6
        async with session() as client:

            async def asking(draw: random.Random) -> None:
                while time.monotonic() < ends:
                    text = draw.choice(TEXTS)
                    status, content, _ = await ask(client, server, texts=[text], task="swapped")
                    statuses[status] += 1
                    if status == 200:
                        (found,) = content["answers"]
                        right = expected[sources[found["adapter"]], text]
                        assert found["outputs"] == pytest.approx(right.outputs, abs=CLOSE)
                        versions.add(found["adapter"])
                    else:
                        assert status == 404 and content["detail"][0]["field"] == "task"

            async def changing() -> None:
                for turn in range(100):
                    if time.monotonic() > ends:
                        return
                    source = ("colours", "animals", "warm")[turn % 3]
                    await put(client, server, "swapped", sending(source))
                    for _ in range(4):  # whichever replicas answer
                        status, content, _ = await ask(client, server, texts=TEXTS[:1], task="swapped")
                        assert status == 200 and sources[content["answers"][0]["adapter"]] == source
                    if turn % 4 == 3:
                        async with client.delete(f"{server.url}/v1/tasks/swapped") as response:
                            assert response.status == 200
                        assert (await ask(client, server, texts=TEXTS[:1], task="swapped"))[0] == 404

            await asyncio.gather(changing(), *(asking(random.Random(n)) for n in range(3)))
            await client.delete(f"{server.url}/v1/tasks/swapped")
        return statuses, versions

    statuses, versions = asyncio.run(scenario())
    assert set(statuses) == {200, 404} and versions == set(sources)


def test_killed_replicas_lose_no_request(server, alone, sending):
    async def add() -> None:
        async with session() as client:
            await put(client, server, "kept", sending("warm", statistics=None))

    async def kill() -> None:
        await asyncio.sleep(0.3)
        first, *_ = server.replicas()
        first.kill()

    asyncio.run(add())
    assert len(server.replicas()) == 2
    statuses = asyncio.run(load(server, alone, requests=300, at_once=6, during=kill))
    assert sum(statuses.values()) == 300 and statuses[200] > 200
    before = {each.pid for each in server.replicas()}
    for each in server.replicas():
        each.kill()

    async def after() -> Any:
        async with session() as client:
            while (found := await ask(client, server, texts=TEXTS[:1], task="kept"))[0] != 200:
                assert found[0] in (503, 504), found
                await asyncio.sleep(0.5)
            return found[1]

    found = asyncio.run(asyncio.wait_for(after(), 120))["answers"][0]
    (expected,) = alone.answer([Asked(TEXTS[0], "warm")])
    assert found["outputs"] == pytest.approx(expected.outputs, abs=CLOSE)  # it survived both
    assert not before & {each.pid for each in server.replicas()}


def test_metrics_are_counted_without_a_series_for_each_task(server):
    def metrics() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=60) as response:
            return str(response.read().decode())

    ends = time.monotonic() + 60
    while "ray_qtuning_texts_total{" not in (text := metrics()) or "ray_qtuning_batch_texts_bucket{" not in text:
        assert time.monotonic() < ends, text
        time.sleep(1)
    assert 'path="/v1/answers",status="200"' in text and "ray_qtuning_request_seconds_bucket{" in text
    ours = [line for line in text.splitlines() if line.startswith("ray_qtuning_")]
    assert not [line for line in ours if "warm" in line or "swapped" in line]


def test_what_serve_run_is_told_is_checked(run, monkeypatch):
    monkeypatch.delenv("QTUNING_FAST_KEYS", raising=False)
    monkeypatch.delenv("QTUNING_FAST_ADMIN_KEYS", raising=False)
    for words, error in (
        ({}, "run is missing"),
        ({"run": "/nowhere"}, "holds no run"),
        ({"run": str(run), "gateways": "none"}, "gateways is 'none'"),
        ({"run": str(run), "colour": "red"}, "colour: no such option"),
        ({"run": str(run)}, "there is no key"),
        ({"run": str(run), "host": "127.0.0.1"}, "host: no argument of this application; address and port are those"),
        ({"run": str(run), "port": "80", "metrics_port": "81"}, "port, metrics_port: no argument"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            app(words)
    assert app({"run": str(run), "without_keys": "true", "replicas": "2"}) is not None
