"""Serving 1, 100 and 2,000 tasks at random: mixed batches, beside one task at a time, and beside peft's LoRA switching.

    python -m qtuning_fast.bench.rows.serving

MiniLM serves random adapters; each request is one text of a task drawn at random, and so many are asked at once
(`--at-once`). `mixed` is `qtuning-fast serve` with its batches of any tasks. `one-task` is the same server, told to put
one text into a batch, so that each pass is of one task. `lora` is peft: one LoRA adapter a task, `set_adapter`, and a
pass, in one process behind the same HTTP. Answers of the first two are compared with those of an engine alone. Measured
are requests a second, the latency's median and 99th percentile, and the memory of all processes of the server.

Needs the extra `serve`, and peft for its row. Clients and servers share this machine and listen on loopback.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from qtuning_fast.bench.rows.command import Command
from qtuning_fast.lifelong.stream import MINILM

TASKS, DRY_TASKS = (1, 100, 2000), (1, 5)
ROWS = ("mixed", "one-task", "lora")
WORDS = "the a house movie doctor space question game team price film new old very good bad where who".split()  # noqa: SIM905
CLOSE = 1e-3  # of a probability, in batches of other shapes
_STARTS_WITHIN = 600.0


@dataclass(frozen=True)
class Load:
    """What clients ask.

    Attributes:
        requests: how many are measured; a tenth of that warms up.
        at_once: how many wait at the same time.
        words: of a text, at most.
    """

    requests: int
    at_once: int
    words: int = 24

    def questions(self, tasks: int, seed: int) -> list[tuple[str, str]]:
        """Texts and their tasks."""
        draw = random.Random(seed)
        return [
            (" ".join(draw.choices(WORDS, k=draw.randint(3, self.words))), f"task-{draw.randrange(tasks):04d}")
            for _ in range(self.requests)
        ]


def write_run(folder: Path, model: str, tasks: int) -> None:
    """Write a run whose adapters are random, of the size of a full queue's."""
    import torch

    from qtuning_fast import QTuningConfig, QTuningModel
    from qtuning_fast.bench.rows.mixed_tasks import random_adapter
    from qtuning_fast.lifelong.base_models import load_base_model
    from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
    from qtuning_fast.model.checked_files import write_json

    config = QTuningConfig()
    base, _ = load_base_model(model)
    saved, generator = QTuningModel(base, config), torch.Generator().manual_seed(0)
    rows = config.shared_length + config.queue_size * config.prompt_length
    for number in range(tasks):
        saved.add_task(random_adapter(saved, f"task-{number:04d}", rows, generator))
    saved.save_pretrained(folder / "adapter")
    settings = {
        "training": TrainingOptions().to_dict(),
        "about": {"base_model": model, "data": DataOptions().to_dict()},
        "tasks": {},
        "method": config.to_dict(),
    }
    write_json(folder / "run.json", settings)


@contextmanager
def server(command: Sequence[str], port: int) -> Iterator[psutil.Process]:
    """A server in a process of its own, ready to answer; what it prints is shown only if it fails."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            ends = time.monotonic() + _STARTS_WITHIN
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > ends:
                    said.seek(0)
                    raise RuntimeError(f"the server did not start: {said.read()[-2000:]}")
                time.sleep(0.2)
            yield psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _answers(port: int) -> bool:
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


async def drive(port: int, questions: Sequence[tuple[str, str]], at_once: int) -> tuple[float, list[float], list[Any]]:
    """Ask all questions, so many at once.

    Returns:
        The seconds of all, those of each, and the answers.

    Raises:
        RuntimeError: one was refused.
    """
    import aiohttp

    slots, taken, answers = asyncio.Semaphore(at_once), [0.0] * len(questions), [None] * len(questions)
    timeout, connector = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=at_once)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout, connector=connector) as client:

        async def one(place: int, text: str, task: str) -> None:
            async with slots:
                began = time.perf_counter()
                async with client.post("/v1/answers", json={"texts": [text], "task": task}) as response:
                    content = await response.json()
                    if response.status != 200:
                        raise RuntimeError(f"a request was refused with {response.status}: {content}")
                taken[place], answers[place] = time.perf_counter() - began, content["answers"][0]

        began = time.perf_counter()
        await asyncio.gather(*(one(place, *each) for place, each in enumerate(questions)))
        return time.perf_counter() - began, taken, answers


def memory(process: psutil.Process) -> int:
    """The memory of a process and all that it started, in bytes; what several share counts once."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


def measured(command: Sequence[str], port: int, load: Load, tasks: int, run: Path | None) -> dict[str, Any]:
    """Start a server, warm it up, and measure a load; with a run, compare each answer with its engine's alone."""
    with server(command, port) as process:
        asyncio.run(drive(port, load.questions(tasks, seed=1)[: max(1, load.requests // 10)], load.at_once))
        questions = load.questions(tasks, seed=0)
        seconds, taken, answers = asyncio.run(drive(port, questions, load.at_once))
        used = memory(process)
    if run is not None:
        _check(run, questions, answers)
    ordered = sorted(taken)
    return {
        "requests_a_second": len(taken) / seconds,
        "p50_ms": 1000 * ordered[len(ordered) // 2],
        "p99_ms": 1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "memory": used,
        "error": None,
    }


def _check(run: Path, questions: Sequence[tuple[str, str]], answers: Sequence[Any]) -> None:
    """Raise an AssertionError unless the answers are those of an engine that gets each question alone."""
    from qtuning_fast.serving.engine import Engine
    from qtuning_fast.serving.options import ServingOptions
    from qtuning_fast.serving.schema import Answer, Asked

    engine = Engine(run, ServingOptions())
    for (text, task), found in list(zip(questions, answers))[:100]:
        (expected,) = engine.answer([Asked(text, task)])
        assert isinstance(expected, Answer) and found["task"] == task, (expected, found)
        off = max(abs(p - found["outputs"][label]) for label, p in expected.outputs.items())
        if not off < CLOSE:
            raise AssertionError(f"task {task}: an answer of the server is off by {off:.2g}")


def command_of(row: str, run: Path, port: int, tasks: int, cores: int) -> list[str]:
    """The command that starts the server of a row."""
    if row == "lora":
        return [
            sys.executable,
            "-m",
            "qtuning_fast.bench.rows.serving_lora",
            str(run),
            str(port),
            str(tasks),
            str(cores),
        ]
    line = [sys.executable, "-c", "from qtuning_fast.cli import main; main()", "serve", f"--run={run}"]
    line += [f"--port={port}", f"--metrics-port={free_port()}", f"--threads={cores}", "--queue=4096", "--timeout=600"]
    return [*line, *(["--batch=1"] if row == "one-task" else [])]


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def table(tasks: int, rows: dict[str, dict[str, Any]]) -> str:
    """The rows of one number of tasks."""
    lines = [f"{tasks} tasks", f"  {'':<10}{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}{'MB':>8}"]
    for name, row in rows.items():
        if row["error"]:
            lines.append(f"  {name:<10}{row['error']}"[:120])
            continue
        cells = f"{row['requests_a_second']:>12.1f}{row['p50_ms']:>10.1f}{row['p99_ms']:>10.1f}"
        lines.append(f"  {name:<10}{cells}{row['memory'] / 2**20:>8.0f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    line = Command(__spec__.name, __doc__, dry_run="few tasks and requests, to see that it runs")
    line.add_argument("--tasks", type=int, nargs="+", help="numbers of tasks; default 1, 100 and 2000")
    line.add_argument("--row", nargs="+", choices=ROWS, default=list(ROWS), help="only these rows")
    line.add_argument("--requests", type=int, default=2000, help="of each row")
    line.add_argument("--at-once", type=int, default=32, help="requests that wait at the same time")
    line.add_argument("--model", default=MINILM, help="a folder, or a name on the hub")
    options = line.parse(arguments)
    load = Load(20, 4) if options.dry_run else Load(options.requests, options.at_once)
    results, cores = line.results(options), max(1, (os.cpu_count() or 2) // 2)  # the clients need the other half
    for tasks in options.tasks or (DRY_TASKS if options.dry_run else TASKS):
        rows: dict[str, dict[str, Any]] = {}
        folder = Path(tempfile.mkdtemp(prefix="serving-"))
        try:
            write_run(folder, options.model, tasks)
            for row in options.row:
                port = free_port()
                command = command_of(row, folder, port, tasks, cores)
                try:
                    rows[row] = measured(command, port, load, tasks, None if row == "lora" else folder)
                except RuntimeError as error:  # a row that cannot be measured; the others go on
                    rows[row] = {"error": str(error).splitlines()[-1]}
        finally:
            shutil.rmtree(folder)
        entry = {"tasks": tasks, "requests": load.requests, "at_once": load.at_once, "rows": rows}
        results.add(f"{tasks}-tasks", entry)
        print(table(tasks, rows), flush=True)
        failed = {row: each["error"] for row, each in rows.items() if each["error"]}
        if failed:
            print(json.dumps(failed, indent=2), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
