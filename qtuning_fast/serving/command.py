"""`qtuning-fast serve`: a server on one machine, from its start to its drained end."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import torch

from qtuning_fast.serving.keys import Keys
from qtuning_fast.serving.options import ServingOptions

_WAITING_CONNECTIONS = 2048
_OBJECT_STORE_BYTES = 128 * 2**20  # requests and answers are small


def run_server(run: Path, options: ServingOptions, say: Callable[[str], None]) -> None:
    """Serve a run until Ctrl-C or SIGTERM; then answer what is in flight and end.

    Args:
        run: folder of the run.
        options: where to listen, limits and sizes.
        say: gets what a user is to read.

    Raises:
        ImportError: ray or FastAPI is not installed.
        OSError, TypeError, ValueError: an option, a key or the run is wrong, or the port is taken.
    """
    keys = Keys.read(options)
    try:
        import fastapi  # noqa: F401
        import ray
        import uvicorn
        from ray import serve
    except ImportError as error:
        raise ImportError(f"serving needs {error.name}: pip install 'qtuning_fast[lifelong,serve]'") from None
    from qtuning_fast.serving import application, gateway
    from qtuning_fast.serving.engine import check_run

    check_run(run)
    cpus = os.cpu_count() or 1
    _check_cores(options, cpus)
    listening, metrics = _socket(options.host, options.port, "port"), _socket("", options.metrics_port, "metrics_port")
    metrics.close()  # Ray opens it
    say(f"Starting {options.replicas} replica{'s' * (options.replicas > 1)} of {run}; Ctrl-C stops.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=_OBJECT_STORE_BYTES,
        _metrics_export_port=options.metrics_port,
    )
    stopped = _end_by_signals()
    try:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        try:
            handle = serve.run(
                application.engine(run.absolute(), options, cpus=cpus), name=application.NAME, route_prefix=None
            )
        except RuntimeError as error:
            raise ValueError(f"no replica could start: {_reason(error)}") from None
        backend = application.Replicas(handle, options)
        app = gateway.build(backend, options, keys, application.counting(options))
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(options.drain) or 1,
            )
        )
        host = f"[{options.host}]" if ":" in options.host else options.host
        listening.listen(_WAITING_CONNECTIONS)
        say(f"Serving at http://{host}:{listening.getsockname()[1]}, metrics at port {options.metrics_port}.")
        if not stopped:
            server.run(sockets=[listening])
        say("Stopped.")
    finally:
        listening.close()
        ray.shutdown()  # with all replicas; nothing is in flight any more


def _check_cores(options: ServingOptions, cpus: int) -> None:
    wanted = (options.threads or 1) * options.replicas
    if wanted > cpus:
        raise ValueError(
            f"replicas is {options.replicas}, with {options.threads or 1} threads each, but this machine has {cpus} "
            "cores; ask for fewer"
        )
    gpus = torch.cuda.device_count()
    if (options.gpus or 0) * options.replicas > gpus or (gpus and options.gpus is None and options.replicas > gpus):
        raise ValueError(
            f"replicas is {options.replicas}, with {options.gpus or 1:g} GPUs each, but this machine has {gpus}; ask "
            "for fewer, or let replicas share one, as with --gpus 0.5"
        )


def _socket(host: str, port: int, option: str) -> socket.socket:
    """Take a port before anything slow starts."""
    taken = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        where = f" of host {host!r}" if host else ""
        raise OSError(f"{option} is {port}{where}: cannot listen there: {error.strerror or error}") from None
    return taken


def _end_by_signals() -> list[int]:
    """Note SIGINT and SIGTERM instead of dying of them: the server's own handlers drain it, and then raise them again.

    Returns:
        The signals that came, a list that grows.
    """
    came: list[int] = []
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: came.append(number))
    return came


def _reason(error: RuntimeError) -> str:
    """The last line of what Serve says of a deployment that failed, which has the error of its constructor."""
    from ray import serve

    applications = serve.status().applications.values()
    messages = [each.message for app in applications for each in app.deployments.values()]
    lines = [line.strip() for message in [*messages, str(error)] for line in message.splitlines() if "Error" in line]
    return lines[-1] if lines else str(error)
