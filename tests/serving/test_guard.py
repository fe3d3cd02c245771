"""What a request passes before its body is read: host, key, size and time."""

from __future__ import annotations

import asyncio
from functools import cache

import pytest

pytest.importorskip("fastapi", reason="serving needs FastAPI: pip install 'qtuning_fast[serve]'")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

from qtuning_fast.serving import gateway
from qtuning_fast.serving.guard import Guard
from qtuning_fast.serving.keys import Keys, _digest
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.schema import Refused

KEY, ADMIN = "a-key-that-asks-1", "a-key-of-an-admin"


async def echo(scope, receive, send):
    message = await receive()
    await PlainTextResponse(message["body"])(scope, receive, send)


def ask(guard, path="/v1/answers", method="POST", body=(b"{}",), pause=0.0, root_path="", **headers):
    """Send a request with its body in parts; return status, body and headers."""
    parts, sent = list(body), []
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root_path,
        "query_string": b"",
        "headers": [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()],
    }

    async def receive():
        if pause and len(parts) < len(body):
            await asyncio.sleep(pause)
        if not parts:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    assert sent, "there is no response"
    named = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent), named


def guard_of(keys=None, counted=lambda *ignored: None, **options):
    settings = ServingOptions(**options)
    return Guard(echo, settings, keys or Keys.read(settings), counted)


@pytest.fixture
def keys(monkeypatch):
    monkeypatch.setenv("QTUNING_FAST_KEYS", KEY)
    monkeypatch.setenv("QTUNING_FAST_ADMIN_KEYS", ADMIN)
    return Keys.read(ServingOptions())


def test_a_body_is_handed_on_whole():
    assert ask(guard_of(), body=(b"one ", b"", b"two"), host="localhost:8000")[:2] == (200, b"one two")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_this_machine_is_called_by_its_own_names(host):
    assert ask(guard_of(), host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "", "[", "127.0.0.1.nip.io:8000"])
def test_a_site_whose_name_leads_here_is_refused(host, keys):
    status, body, _ = ask(guard_of(Keys(anyone_administrates=True)), host=host)
    assert status == 421 and b'"field":"Host"' in body
    assert ask(guard_of(keys), host=host, authorization=f"Bearer {KEY}")[0] == 200  # a site does not know the key


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("POST", "/v1/answers", None, 401),
        ("POST", "/v1/answers", "Bearer wrong", 401),
        ("POST", "/v1/answers", f"Bearer {KEY}", 200),
        ("GET", "/v1/tasks", None, 401),
        ("GET", "/v1/tasks", f"Bearer {KEY}", 200),
        ("PUT", "/v1/tasks/x", None, 401),
        ("PUT", "/v1/tasks/x", f"Bearer {KEY}", 403),
        ("DELETE", "/v1/tasks/x", f"Bearer {KEY}", 403),
        ("PUT", "/v1/tasks/x", f"Bearer {ADMIN}", 200),
        ("DELETE", "/v1/tasks/x", f"Bearer {ADMIN}", 200),
        ("GET", "/health/live", None, 200),
        ("GET", "/", None, 200),
    ],
)
def test_who_may_do_what(method, path, key, status, keys):
    headers = {} if key is None else {"authorization": key}
    for prefix in ("", "/qt", "/v1", "/v1/tasks"):  # under which Serve or a proxy offers it: in path and root_path
        found, body, named = ask(guard_of(keys), prefix + path, method, root_path=prefix, host="localhost", **headers)
        assert found == status, (prefix, body)
        if status in (401, 403):
            assert b'"field":"Authorization"' in body and KEY.encode() not in body
        assert ("www-authenticate" in named) is (status == 401)


class Reached:
    """A backend that notes what reaches it."""

    def __init__(self):
        self.calls = []

    async def answer(self, asked, timeout):
        self.calls.append("answer")
        raise Refused(409, "server", "reached")

    async def call(self, method, *arguments):
        self.calls.append(method)
        raise Refused(409, "server", "reached")

    async def is_ready(self):
        return True


FORM = b"".join(
    b'--x\r\nContent-Disposition: form-data; name="%b"; filename="a"\r\n\r\na\r\n' % name
    for name in (b"index", b"tensors")
)
DIGESTS = Keys(asking=(_digest(KEY),), administration=(_digest(ADMIN),))


BACKEND = Reached()


@cache
def guarded():
    counting = gateway.Counting(lambda *ignored: None, lambda answers: None)
    return gateway.build(BACKEND, ServingOptions(), DIGESTS, counting)


def reached(method, path, root_path, key):
    """Ask a whole gateway that has keys; return the status and what reached the backend."""
    BACKEND.calls = []
    kind, body = "application/json", b'{"texts": ["a"]}'
    if method == "PUT":
        kind, body = "multipart/form-data; boundary=x", FORM + b"--x--\r\n"
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    status, *_ = ask(
        guarded(), path, method, (body,), root_path=root_path, host="localhost", content_type=kind, **headers
    )
    return status, BACKEND.calls


CALLS = [
    ("POST", "/v1/answers", "answer"),
    ("GET", "/v1/tasks", "tasks"),
    ("GET", "/v1/tasks/a/b", "task"),
    ("PUT", "/v1/tasks/a/b", "put"),
    ("DELETE", "/v1/tasks/a/b", "remove"),
]
PUBLIC = ["/", "/docs", "/openapi.json", "/health/live", "/health/ready"]


@pytest.mark.parametrize("prefix", ["", "/qt", "/v1", "/v1/tasks", "/docs", "/a/b"])
def test_routes_are_guarded_under_any_prefix(prefix):
    for method, path, call in CALLS:
        changes = call in ("put", "remove")
        assert reached(method, prefix + path, prefix, None) == (401, [])
        assert reached(method, prefix + path, prefix, KEY) == ((403, []) if changes else (409, [call]))
        assert reached(method, prefix + path, prefix, ADMIN) == (409, [call])
    for path in PUBLIC:
        assert reached("GET", prefix + path, prefix, None) == (200, [])
    for path in ("/nowhere", "/v2/tasks", "/docs/x", "/v1"):
        assert reached("GET", prefix + path, prefix, None) == (401, [])
        assert reached("GET", prefix + path, prefix, KEY) == (404, [])


@pytest.mark.parametrize("prefix", ["", "/qt"])
def test_a_large_body_is_for_adapters_alone_under_any_prefix(prefix):
    guard = guard_of(max_body_kb=2, max_adapter_mb=1)
    for path, status in (("/v1/tasks/x", 200), ("/v1/answers", 413), ("/v1/other", 413), ("/", 413)):
        found = ask(guard, prefix + path, "PUT", (b"x" * 2**20,), root_path=prefix, host="localhost")[0]
        assert found == status, path


PIECES = ["/", "//", "v1", "V1", "tasks", "answers", "x", "qt", "docs", "health/live", "/v1/tasks/x", "/v1/answers"]
ODD = ["..", "/../", ".", "%2f", "%2F", "%00", "\n", "\\", ";", "?", "#", " ", "\u00e9", "\u2215", "\x00"]
PATHS = st.lists(st.sampled_from(PIECES + ODD) | st.text(max_size=3), max_size=6).map("".join)
ROOTS = st.sampled_from(["", "/", "/qt", "/qt/", "qt", "/v1", "/v1/tasks", "/docs", "//"]) | PATHS
METHODS = st.sampled_from(["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "delete", "ANY"])


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(method=METHODS, root=ROOTS, path=PATHS, under=st.booleans())
@example(method="DELETE", root="/qt", path="/v1/tasks/x", under=True)
@example(method="GET", root="/docs", path="/v1/tasks", under=True)
@example(method="POST", root="", path="/v1/answers\n", under=False)
@example(method="GET", root="/", path="//v1/tasks", under=False)
@example(method="GET", root="/qt", path="/v1/tasks", under=False)
def test_without_a_key_no_path_reaches_the_backend(method, root, path, under):
    path = root + path if under else path
    status, calls = reached(method, path, root, None)
    assert calls == [] and status in (200, 307, 401, 404, 405)
    assert not {"put", "remove"} & {*reached(method, path, root, KEY)[1]}


def test_a_wrong_key_is_refused_before_the_body_is_read(keys):
    assert ask(guard_of(keys, timeout=0.5), body=(b"x", b"y", b"z"), pause=30, host="localhost")[0] == 401


@pytest.mark.parametrize(
    ("path", "method", "size", "status"),
    [
        ("/v1/answers", "POST", 2048, 200),
        ("/v1/answers", "POST", 2049, 413),
        ("/v1/tasks/x", "PUT", 2**20, 200),
        ("/v1/tasks/x", "PUT", 2**20 + 2**18 + 1, 413),
        ("/v1/tasks", "GET", 2049, 413),
    ],
)
@pytest.mark.parametrize("declared", [True, False])
def test_what_is_too_large_is_refused(path, method, size, status, declared):
    headers = {"content_length": str(size)} if declared else {}
    body = tuple(b"x" * min(1000, size - start) for start in range(0, size, 1000))
    guard = guard_of(max_body_kb=2, max_adapter_mb=1)
    found, said, _ = ask(guard, path, method, body, host="localhost", **headers)
    assert found == status, said
    assert status == 200 or b'"field":"body"' in said


@pytest.mark.parametrize("length", ["-1", "1e3", "ten", "99999999999999999999"])
def test_a_size_that_is_none_is_refused(length):
    assert ask(guard_of(), host="localhost", content_length=length)[0] == 413


def test_a_body_that_does_not_arrive_is_given_up():
    status, body, _ = ask(guard_of(timeout=0.05), body=(b"x", b"y"), pause=30, host="localhost")
    assert status == 408 and b"did not arrive within 0.05 s" in body
    assert ask(guard_of(), body=(), host="localhost")[0] == 400  # the connection was closed


def test_requests_are_counted_by_few_names():
    seen = []
    guard = guard_of(counted=lambda *each: seen.append(each[:2]))
    for path in ("/v1/answers", "/v1/tasks/one", "/v1/tasks/two/three", "/secret", "/v1/x"):
        ask(guard, path, host="localhost")
    ask(guard, "/qt/v1/tasks/one", root_path="/qt", host="localhost")
    ask(guard, host="elsewhere")
    route = "/v1/tasks/{name}"
    assert seen == [
        ("/v1/answers", 200),
        (route, 200),
        (route, 200),
        ("other", 200),
        ("other", 200),
        (route, 200),
        ("/v1/answers", 421),
    ]
