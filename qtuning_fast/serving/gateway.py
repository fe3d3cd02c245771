"""The gateway: HTTP in front of an engine. It checks requests, asks the engine, and turns refusals into responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, File, Form, Path, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from qtuning_fast.serving.guard import Guard
from qtuning_fast.serving.keys import Keys
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.page import api_page, trial_page
from qtuning_fast.serving.schema import (
    MOST_CHARACTERS_OF_A_NAME,
    Answer,
    Answers,
    Asked,
    Fault,
    Faults,
    Question,
    Refused,
    Reply,
    SentAdapter,
    State,
    TaskDescription,
    TaskList,
    printable,
)
from qtuning_fast.version import __version__

MOST_LISTED = 1000
_ONE_TASK = "/v1/tasks/{name:path}"  # a name may have slashes


class Backend(Protocol):
    """What answers for the gateway. Every call may raise `Refused`."""

    async def answer(self, asked: Sequence[Asked], timeout: float) -> list[Reply]:
        """Answer questions of one request within so many seconds."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine: `tasks`, `task`, `put` or `remove`."""

    async def is_ready(self) -> bool:
        """Whether questions can be answered now."""


@dataclass(frozen=True)
class Counting:
    """What is counted of requests; the functions are called in the event loop and must not wait.

    Attributes:
        request: gets the route, the status and the seconds of each request.
        texts: gets each reply to a text.
    """

    request: Callable[[str, int, float], None]
    texts: Callable[[Sequence[Answer]], None]


_REASONS = {
    400: "The body cannot be read.",
    401: "There is no key, or a wrong one.",
    403: "The key is not one of administration, or there is none.",
    404: "There is no such task, or no such page.",
    405: "The page has no such method.",
    408: "The body did not arrive in time.",
    409: "Tasks cannot be added now.",
    413: "The body is too large.",
    415: "The body is no JSON, or no form.",
    421: "The request is for another host.",
    422: "A field is missing, wrong, or beyond a limit.",
    500: "The server failed.",
    503: "The queue is full, or a replica was lost: the same request may be repeated.",
    504: "It took too long: the same request may be repeated.",
}


def _refusals(*more: int) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI page says of refusals: those that any request may meet, and these."""
    return {status: {"model": Faults, "description": _REASONS[status]} for status in sorted({421, 500, *more})}


_GUARDED = (400, 401, 408, 413, 422, 503, 504)
_Name = Annotated[str, Path(description="The task.", min_length=1, max_length=MOST_CHARACTERS_OF_A_NAME)]


class _Described(FastAPI):
    """An application whose description has the limits of this server, and what the guard does."""

    def __init__(self, options: ServingOptions, *, needs_key: bool) -> None:
        super().__init__(
            title="qtuning_fast",
            version=__version__,
            summary="Answers to texts by many tasks on one frozen model.",
            docs_url=None,  # FastAPI's own page loads scripts from elsewhere
            redoc_url=None,
        )
        self._options, self._needs_key = options, needs_key
        self._description: dict[str, Any] | None = None

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI description."""
        if self._description is None:
            self._description = schema = get_openapi(
                title=self.title, version=self.version, summary=self.summary, routes=self.routes
            )
            texts = schema["components"]["schemas"]["Question"]["properties"]["texts"]
            texts["maxItems"] = self._options.max_texts
            texts["items"]["maxLength"] = self._options.max_characters
            if self._needs_key:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, methods in schema["paths"].items():
                    for operation in methods.values() if path.startswith("/v1/") else ():
                        operation["security"] = [{"key": []}]
        return self._description


def build(backend: Backend, options: ServingOptions, keys: Keys, counting: Counting) -> FastAPI:
    """Return the application in front of a backend."""
    app = _Described(options, needs_key=bool(keys.asking))
    _add_answers(app, backend, options, counting)
    _add_tasks(app, backend)
    _add_pages(app, backend, options)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(Guard, options=options, keys=keys, counted=counting.request)
    return app


def _add_pages(app: FastAPI, backend: Backend, options: ServingOptions) -> None:
    @app.get("/", response_class=HTMLResponse, responses=_refusals(), tags=["Pages"])
    async def page() -> HTMLResponse:
        """A page to try it in a browser."""
        return trial_page(options)

    @app.get("/docs", response_class=HTMLResponse, responses=_refusals(), tags=["Pages"])
    async def docs() -> HTMLResponse:
        """This page."""
        return api_page(app.openapi())

    @app.get("/health/live", response_model=State, responses=_refusals(), tags=["Health"])
    async def live() -> State:
        """Whether the server runs."""
        return State(status="live")

    @app.get("/health/ready", response_model=State, responses=_refusals(503), tags=["Health"])
    async def ready() -> State:
        """Whether it can answer: at least one replica has its model."""
        if not await backend.is_ready():
            raise Refused(503, "server", "no replica is ready", 2)
        return State(status="ready")


def _add_answers(app: FastAPI, backend: Backend, options: ServingOptions, counting: Counting) -> None:
    @app.post("/v1/answers", response_model=Answers, responses=_refusals(404, 415, *_GUARDED), tags=["Answers"])
    async def answers(question: Question) -> Response:
        """Answer texts, under one task or under the one that each seems to be of."""
        question.check(options)
        asked = [Asked(text, question.task, question.top_k) for text in question.texts]
        seconds = min(options.timeout, question.timeout or options.timeout)
        found: list[Answer] = []
        for place, reply in enumerate(await backend.answer(asked, seconds)):
            if isinstance(reply, Refused):
                field = f"texts.{place}" if reply.field == "texts" else reply.field
                raise Refused(reply.status, field, reply.message, reply.retry_after)
            found.append(reply)
        counting.texts(found)
        return Response(Answers(answers=found).model_dump_json(), media_type="application/json")


def _add_tasks(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/tasks", response_model=TaskList, responses=_refusals(*_GUARDED), tags=["Tasks"])
    async def tasks(
        after: Annotated[str | None, Query(description="Only tasks behind this name.", max_length=1000)] = None,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED, description="So many at most.")] = MOST_LISTED,
    ) -> Any:
        """List the tasks by name."""
        return await backend.call("tasks", after, limit)

    @app.get(_ONE_TASK, response_model=TaskDescription, responses=_refusals(404, *_GUARDED), tags=["Tasks"])
    async def task(name: _Name) -> Any:
        """Describe a task."""
        return await backend.call("task", name)

    administration = (403, 404, 409, 415, *_GUARDED)

    @app.put(
        _ONE_TASK,
        response_model=TaskDescription,
        responses=_refusals(*administration) | {201: {"model": TaskDescription, "description": "It is new."}},
        tags=["Administration"],
    )
    async def put(
        name: _Name,
        response: Response,
        index: Annotated[UploadFile, File(description="adapter_config.json of a saved model.")],
        tensors: Annotated[UploadFile, File(description="The file that it names for the task.")],
        statistics: Annotated[UploadFile | None, File(description="That of its statistics, to infer it.")] = None,
        name_in_index: Annotated[str | None, Form(description="The task's name there, if it is another.")] = None,
        label_words: Annotated[
            str | None, Form(description="A language model's words for its classes, as a JSON list.")
        ] = None,
        template: Annotated[
            str | None, Form(description="What a language model reads, with {text} in place of the text.")
        ] = None,
    ) -> Any:
        """Add an adapter, or replace the one of this name; answers of batches that begin afterwards are by it."""
        sent = SentAdapter(
            index=await index.read(),
            tensors=await tensors.read(),
            statistics=None if statistics is None else await statistics.read(),
            name_in_index=name_in_index or None,
            label_words=label_words or None,
            template=template or None,
        )
        described, was_there = await backend.call("put", name, sent)
        response.status_code = 200 if was_there else 201
        return described

    @app.delete(_ONE_TASK, response_model=State, responses=_refusals(*administration), tags=["Administration"])
    async def delete(name: _Name) -> State:
        """Remove a task; batches that have begun still answer by it. A repeated call gets 404."""
        await backend.call("remove", name)
        return State(status="removed")


# Refusals as responses


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.content(), error.status, headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Name each wrong field. What was sent is not repeated: JSON may not be able to say it."""
    assert isinstance(error, RequestValidationError)
    faults = []
    for each in error.errors():
        place, *within = each["loc"] or ("body",)
        if each["type"] == "json_invalid":
            within = []
        if place in ("query", "path") and not within:
            within = [place]
        field = ".".join(map(str, within)) or str(place)
        faults.append(Fault(field=printable(field), message=printable(str(each["msg"]).removeprefix("Value error, "))))
    return JSONResponse(Faults(detail=faults).model_dump(), 422)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    field = "path" if error.status_code in (404, 405) else "body"
    fault = Fault(field=field, message=_REASONS.get(error.status_code, str(error.detail)))
    return JSONResponse(Faults(detail=[fault]).model_dump(), error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    fault = Fault(field="server", message=f"the server failed: {type(error).__name__}; its log says more")
    return JSONResponse(Faults(detail=[fault]).model_dump(), 500)
