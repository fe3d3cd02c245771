"""What every request passes before its body is read: host, key and size; it counts them, too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette._utils import get_route_path  # what Starlette and FastAPI route by; there is no public name
from starlette.responses import JSONResponse

from qtuning_fast.serving.keys import Keys
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.schema import Refused

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_DRAINED_BYTES, _DRAINED_SECONDS = 2**26, 1.0
_READING = ("GET", "HEAD", "OPTIONS")
_PUBLIC = ("/health/live", "/health/ready", "/openapi.json", "/docs", "/", "")  # "" is led on to "/"
_ROUTES = ("/v1/answers", "/v1/tasks", *_PUBLIC)


class Guard:
    """ASGI middleware: refuses what may not come in, and hands on the rest with its whole body.

    Args:
        app: what answers.
        options: limits.
        keys: who may ask.
        counted: gets the route, the status and the seconds of each request.
    """

    def __init__(
        self, app: Application, options: ServingOptions, keys: Keys, counted: Callable[[str, int, float], None]
    ) -> None:
        self._app, self._options, self._keys, self._counted = app, options, keys, counted

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one connection's event."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, has_body = time.perf_counter(), 500, True
        path = get_route_path(scope)  # not scope["path"], which has the prefix under which a proxy offers this server

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def read() -> Message:
            nonlocal has_body
            message = await receive()
            has_body = message.get("more_body", False)
            return message

        try:
            try:
                administrates = _administrates(scope["method"], path)
                self._check(scope, path, administrates=administrates)
                body = await self._read(read, self._most(administrates=administrates))
            except Refused as refused:
                if has_body:
                    await _drain(read)
                await _respond(refused, scope, receive, noted)
                return
            await self._app(scope, _once(body, receive), noted)
        finally:
            self._counted(_route(path), status, time.perf_counter() - began)

    def _check(self, scope: MutableMapping[str, Any], path: str, *, administrates: bool) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        options, most = self._options, self._most(administrates=administrates)
        if options.is_loopback and not self._keys.asking and _host(headers.get("host", "")) not in LOOPBACK_NAMES:
            # Else a page of any site whose name leads here could ask in the user's browser.
            raise Refused(421, "Host", f"this server answers for {', '.join(LOOPBACK_NAMES)} alone")
        if path not in _PUBLIC:  # whatever else it is, and whether or not it exists
            given = headers.get("authorization", "")
            if not self._keys.may_ask(given):
                raise Refused(401, "Authorization", "give a key: `Authorization: Bearer KEY`")
            if administrates and not self._keys.may_administrate(given):
                why = "this is not a key of administration" if self._keys.administration else "administration is off"
                raise Refused(403, "Authorization", f"{why}; QTUNING_FAST_ADMIN_KEYS or --admin-keys-file sets keys")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            raise _too_large(most)

    def _most(self, *, administrates: bool) -> int:
        """The size of the body at most, in bytes."""
        options = self._options
        form = 2**18  # what a form has beside its files
        return options.max_adapter_mb * 2**20 + form if administrates else options.max_body_kb * 2**10

    async def _read(self, receive: Receive, most: int) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._options.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "body", "the connection was closed within the body")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(408, "body", f"it did not arrive within {self._options.timeout:g} s") from None


def _administrates(method: str, path: str) -> bool:
    return method not in _READING and path.startswith("/v1/tasks")


def _host(header: str) -> str:
    """The name in a Host header, without a port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def _too_large(most: int) -> Refused:
    return Refused(413, "body", f"it is larger than {most} bytes, the most")


def _once(body: bytes, receive: Receive) -> Receive:
    """What hands on a body that was read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def handed_on() -> Message:
        return messages.pop() if messages else await receive()

    return handed_on


async def _drain(receive: Receive) -> None:
    """Take in the rest of a refused body, within bounds: many clients read no response before they have sent all."""
    size = 0
    try:
        async with asyncio.timeout(_DRAINED_SECONDS):
            while size < _DRAINED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def _respond(refused: Refused, scope: Any, receive: Receive, send: Send) -> None:
    headers = {"Connection": "close"}  # the rest of the body may not have been read
    if refused.retry_after is not None:
        headers["Retry-After"] = str(refused.retry_after)
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    await JSONResponse(refused.content(), refused.status, headers)(scope, receive, send)


def _route(path: str) -> str:
    """A name for the path that has few values, whatever is asked for."""
    if path.startswith("/v1/tasks/"):
        return "/v1/tasks/{name}"
    return (path or "/") if path in _ROUTES else "other"
