"""Requests by the description of the API, right and wrong ones: no 500, and each response is one that it describes.

python -m pytest -m soak tests/serving/test_api_fuzz.py     # 10,000 requests of each kind
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="serving needs FastAPI: pip install 'qtuning_fast[serve]'")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks

from qtuning_fast.serving import gateway
from qtuning_fast.serving.engine import Engine
from qtuning_fast.serving.keys import Keys
from qtuning_fast.serving.options import ServingOptions

LIMITS = ServingOptions(max_texts=4, max_characters=200, max_adapter_mb=1, timeout=5.0)
FEW, MANY = 15, 10_000
KINDS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def described(finished_run: Path, tmp_path_factory: pytest.TempPathFactory):
    options = ServingOptions(adapters=str(tmp_path_factory.mktemp("fuzzed")))
    engine = Engine(finished_run, options)

    class Here:
        async def answer(self, asked, timeout):
            return engine.answer(asked)

        async def call(self, method, *arguments):
            return getattr(engine, method)(*arguments)

        async def is_ready(self):
            return True

    counting = gateway.Counting(lambda *each: None, lambda answers: None)
    app = gateway.build(Here(), LIMITS, Keys(anyone_administrates=True), counting)
    return schemathesis.openapi.from_asgi("/openapi.json", app, headers={"Host": "localhost"})


OPERATIONS = {
    ("/v1/answers", "POST"),
    ("/v1/tasks", "GET"),
    *(("/v1/tasks/{name}", method) for method in ("GET", "PUT", "DELETE")),
    *((path, "GET") for path in ("/", "/docs", "/health/live", "/health/ready")),
}


def test_every_operation_is_asked(described):
    found = {(each.ok().path, each.ok().method.upper()) for each in described.get_all_operations()}
    assert found == OPERATIONS


REQUESTS = [
    (path, method, mode)
    for path, method in sorted(OPERATIONS)
    for mode in GenerationMode
    if path.startswith("/v1/") or mode is GenerationMode.POSITIVE  # pages have no parameter to be wrong
]


def ask(described, path: str, method: str, mode: GenerationMode, examples: int) -> None:
    """Send requests; whatever comes back must be described, and must not be a failure of the server."""

    @settings(max_examples=examples, **KINDS)
    @given(case=described[path][method].as_strategy(generation_mode=mode))
    def asked(case):
        # The description does not say all: no random file is an adapter, and `top_k` does not go with a task.
        excluded = [checks.positive_data_acceptance]
        case.call_and_validate(headers={"Host": "localhost"}, excluded_checks=excluded)

    asked()


@pytest.mark.parametrize(("path", "method", "mode"), REQUESTS)
def test_a_few_requests(path, method, mode, described):
    ask(described, path, method, mode, FEW)


@pytest.mark.soak
@pytest.mark.parametrize(("path", "method", "mode"), REQUESTS)
def test_many_requests(path, method, mode, described):
    ask(described, path, method, mode, MANY)
