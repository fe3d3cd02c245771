"""The Ray Serve application: replicas that hold an engine, with Serve's batching, and the gateway in front of them.

On a cluster: `serve run qtuning_fast.serving.application:app run=/shared/runs/mine replicas=4`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import metrics
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from qtuning_fast.serving import gateway
from qtuning_fast.serving.batching import Batching
from qtuning_fast.serving.keys import Keys
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.schema import Answer, Asked, Refused, Reply

NAME = "qtuning_fast"
_TRIES = 3
_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
_COUNTS = [float(2**power) for power in range(11)]
_OF_SERVE = ("host", "port", "metrics_port")  # options that mean nothing where Serve and Ray listen


@serve.deployment(name="Engine")
class EngineReplica:
    """A process that holds the model."""

    def __init__(self, run: str, options: ServingOptions, threads: int) -> None:
        import torch

        from qtuning_fast.serving.engine import Engine  # which a gateway does not need

        torch.set_num_threads(threads)
        self._engine = Engine(Path(run), options)
        self._thread = ThreadPoolExecutor(1, "engine")  # the engine takes one call at a time
        self._batching = Batching(self._answered, options.batch)
        self._batch_texts = metrics.Histogram("qtuning_batch_texts", "Texts in a batch.", _COUNTS)
        self._batch_tasks = metrics.Histogram("qtuning_batch_tasks", "Tasks in a batch.", _COUNTS)
        self._batch_seconds = metrics.Histogram("qtuning_batch_seconds", "Seconds of a batch.", _SECONDS)

    async def answer(self, asked: list[Asked]) -> list[Reply]:
        """Answer the questions of a request, in one batch with those of others."""
        return await self._batching.answer(asked)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call another method of the engine; a refusal is returned, since Ray would wrap what is raised."""
        try:
            return await self._alone(getattr(self._engine, method), *arguments)
        except Refused as refused:
            return refused

    async def _answered(self, asked: list[Asked]) -> list[Reply]:
        began = time.perf_counter()
        replies: list[Reply] = await self._alone(self._engine.answer, asked)
        self._batch_seconds.observe(time.perf_counter() - began)
        self._batch_texts.observe(len(asked))
        self._batch_tasks.observe(max(1, len({each.task for each in replies if isinstance(each, Answer)})))
        return replies

    async def _alone(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


class Replicas:
    """The backend of a gateway: replicas, behind Serve's handle.

    A request whose replica dies is repeated on another: every request may be, because answers change nothing, and an
    addition or a removal that is repeated ends in the same state.

    Args:
        handle: that of the engine's deployment.
        options: limits.
        application: the name under which Serve runs it.
    """

    def __init__(self, handle: DeploymentHandle, options: ServingOptions, application: str = NAME) -> None:
        self._handle, self._options, self._application = handle, options, application
        self._seen_ready = (float("-inf"), False)

    async def answer(self, asked: Sequence[Asked], timeout: float) -> list[Reply]:
        """See `gateway.Backend`."""
        size = self._options.batch
        parts = [list(asked[start : start + size]) for start in range(0, len(asked), size)]
        waiting = [asyncio.ensure_future(self._asked(self._handle.answer, timeout, part)) for part in parts]
        try:
            return [reply for found in await asyncio.gather(*waiting) for reply in found]
        finally:
            for each in waiting:
                each.cancel()

    async def call(self, method: str, *arguments: Any) -> Any:
        """See `gateway.Backend`."""
        found = await self._asked(self._handle.call, self._options.timeout, method, *arguments)
        if isinstance(found, Refused):
            raise found
        return found

    async def is_ready(self) -> bool:
        """See `gateway.Backend`; asked at most once a second."""
        at, found = self._seen_ready
        if time.monotonic() - at > 1:
            try:
                found = await asyncio.wait_for(asyncio.to_thread(_has_running_replica, self._application), 5)
            except Exception:  # whatever fails there, nothing can be answered now
                found = False
            self._seen_ready = time.monotonic(), found
        return found

    async def _asked(self, method: Any, timeout: float, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(timeout):
                for _ in range(_TRIES - 1):
                    try:
                        return await _result(method, *arguments)
                    except RayActorError:
                        await asyncio.sleep(0.1)  # until Serve has noticed, too
                return await _result(method, *arguments)
        except TimeoutError:
            raise Refused(504, "server", f"there was no answer within {timeout:g} s; try again", 1) from None
        except BackPressureError:
            raise Refused(503, "server", "the queue is full; try again", 1) from None
        except (RayActorError, DeploymentUnavailableError):
            raise Refused(503, "server", "the replica that had this request is gone; try again", 2) from None


async def _result(method: Any, *arguments: Any) -> Any:
    response = method.remote(*arguments)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()  # so that nothing is computed that nobody waits for
        raise


def _has_running_replica(application: str) -> bool:
    states = serve.status().applications[application].deployments["Engine"].replica_states
    return any(str(getattr(state, "value", state)) == "RUNNING" and count for state, count in states.items())


def _names(*names: str) -> Any:
    """Names of tags; Ray's annotation allows one alone."""
    return names


def counting(options: ServingOptions) -> gateway.Counting:
    """Return what counts requests and texts, for Ray's Prometheus port."""
    requests = metrics.Counter("qtuning_requests", "Requests by route and status.", tag_keys=_names("path", "status"))
    seconds = metrics.Histogram("qtuning_request_seconds", "Seconds of a request.", _SECONDS, tag_keys=("path",))
    keys = _names("asked", "task") if options.metrics_by_task else _names("asked")
    texts = metrics.Counter("qtuning_texts", "Texts that were answered.", tag_keys=keys)

    def request(path: str, status: int, taken: float) -> None:
        requests.inc(tags={"path": path, "status": str(status)})
        seconds.observe(taken, tags={"path": path})

    def answered(answers: Sequence[Answer]) -> None:
        for each in answers:
            tags = {"asked": "named" if each.inferred is None else "inferred", "task": each.task}
            texts.inc(tags={key: tags[key] for key in keys})

    return gateway.Counting(request, answered)


@serve.deployment(name="Gateway")
@serve.ingress()
class Gateway:
    """The gateway as a replica, behind Serve's own proxy: on a cluster."""

    def __init__(self, engine: DeploymentHandle, options: ServingOptions, keys: Keys) -> None:
        self._engine, self._options, self._keys = engine, options, keys

    def __serve_build_asgi_app__(self) -> FastAPI:
        backend = Replicas(self._engine, self._options, serve.get_replica_context().app_name)
        return gateway.build(backend, self._options, self._keys, counting(self._options))


def engine(run: Path, options: ServingOptions, *, cpus: int) -> serve.Application:
    """Return the replicas of a run's engine, as an application for `serve.run`.

    Args:
        run: folder of the run.
        options: limits and sizes.
        cpus: the cores of this machine, which the replicas share if nothing else is said.
    """
    import torch

    threads = options.threads or max(1, cpus // options.replicas)
    gpus = options.gpus if options.gpus is not None else float(torch.cuda.is_available())
    return (
        cast(Any, EngineReplica)
        .options(
            num_replicas=options.replicas,
            max_ongoing_requests=2 * options.batch,  # one batch computes, and the next one fills
            max_queued_requests=options.queue,
            ray_actor_options={"num_cpus": threads, "num_gpus": gpus},
            health_check_period_s=2,
            health_check_timeout_s=options.timeout,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=options.drain,
            max_constructor_retry_count=2,
        )
        .bind(str(run), options, threads)
    )


def app(arguments: dict[str, str]) -> serve.Application:
    """Return the whole application for `serve run`, or a file for `serve deploy`.

    Args:
        arguments: `run`, any option of `ServingOptions`, and `gateways`, how many processes take in requests. On a
            cluster others reach the server, so it needs keys, or `without_keys=true`. Address and ports are Serve's:
            `host`, `port` and `metrics_port` are refused.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    words = {name: str(value) for name, value in arguments.items()}
    if "run" not in words:
        raise ValueError("run is missing: run=/path/to/a/run")
    run, gateways = Path(words.pop("run")).absolute(), words.pop("gateways", "1")
    if not gateways.isdigit() or gateways == "0":
        raise ValueError(f"gateways is {gateways!r}; it must be a positive integer")
    if of_serve := [name for name in _OF_SERVE if name in words]:
        raise ValueError(
            f"{', '.join(of_serve)}: no argument of this application; address and port are those of `serve start "
            "--http-host --http-port`, or http_options in the file of `serve deploy`, and the metrics' port is Ray's"
        )
    from qtuning_fast.serving.engine import check_run

    check_run(run)
    options = ServingOptions.from_words(words | {"host": "0.0.0.0"})  # wherever Serve listens, others may reach it
    keys = Keys.read(options)
    engines = engine(run, options, cpus=options.threads or 1)  # how many a node has is not known here
    bound = (
        cast(Any, Gateway)
        .options(
            num_replicas=int(gateways),
            # The engine's queue is full before this one:
            max_ongoing_requests=4 * (options.queue + 2 * options.batch * options.replicas),
            ray_actor_options={"num_cpus": 0},
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=options.drain,
        )
        .bind(engines, options, keys)
    )
    assert isinstance(bound, serve.Application)
    return bound
