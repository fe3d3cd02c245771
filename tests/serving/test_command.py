"""The command: what is wrong is said before anything starts, and a server that is told to end answers what it took."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qtuning_fast.cli import app
from qtuning_fast.model.checked_files import read_json, write_json

KEY = "a-key-that-asks-1"


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["serve", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QTUNING_FAST_KEYS", "QTUNING_FAST_ADMIN_KEYS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port=0"], "port is 0"),
        (["--replicas=0"], "replicas is 0"),
        (["--timeout=-1"], "timeout is -1"),
        (["--host=0.0.0.0"], "there is no key: set QTUNING_FAST_KEYS"),
        (["--keys-file=/nowhere"], "/nowhere"),
        (["--batch=many"], "--batch"),
        (["--gpus=-1"], "gpus is -1"),
    ],
)
def test_wrong_options_are_refused_by_name(options: list[str], said: str, finished_run: Path) -> None:
    code, output = call(f"--run={finished_run}", *options)
    assert code == 2 and said in output and "Traceback" not in output


def test_a_launcher_of_several_processes_is_refused(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtuning_fast.model.distributed.process_count", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("qtuning_fast.lifelong.processes.leave", lambda code: None)  # else this process ends
    code, output = call(f"--run={finished_run}", "--port=0")
    assert code == 2 and "serve runs in one process, but a launcher has started 2; start it without" in output


def test_a_missing_package_is_named(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, output = call(f"--run={finished_run}")
    assert code == 2 and "serving needs fastapi: pip install 'qtuning_fast[lifelong,serve]'" in output


def test_what_cannot_be_served_is_refused_before_ray_starts(run: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="serving needs ray: pip install 'qtuning_fast[serve]'")
    assert "holds no run" in call(f"--run={tmp_path / 'nothing'}")[1]
    assert "this machine has" in call(f"--run={run}", "--replicas=500")[1]
    assert "GPUs each, but this machine has" in call(f"--run={run}", "--gpus=64")[1]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, output = call(f"--run={run}", f"--port={taken.getsockname()[1]}")
        assert code == 2 and "cannot listen there" in output
    settings = read_json(run / "run.json")
    settings["method"]["task_type"] = "image-classification"
    write_json(run / "run.json", settings)
    assert "classifies images" in call(f"--run={run}")[1]
    assert not ray.is_initialized()


def test_other_commands_need_none_of_it() -> None:
    code = """
import sys
for name in ("ray", "fastapi", "uvicorn"):
    sys.modules[name] = None
from qtuning_fast.cli import app
app(["serve", "--help"])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and "--metrics-by-task" in done.stdout, done.stderr


def ask(url: str, texts: list[str]) -> int:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = json.dumps({"texts": texts, "task": "animals"}).encode()
    with urllib.request.urlopen(urllib.request.Request(url + "/v1/answers", body, headers), timeout=180) as response:
        return len(json.load(response)["answers"])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_server_that_is_told_to_end_answers_what_it_took(number: signal.Signals, run: Path, serving) -> None:
    server = serving(run, "--threads=1", "--batch=1", "--queue=1000", "--timeout=120", "--drain=120")
    assert ask(server.url, ["a cat"]) == 1
    answered: list[int] = []
    threads = [threading.Thread(target=lambda: answered.append(ask(server.url, ["a cat"] * 12))) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)  # in flight: each text is a batch of its own
    code, said = server.end(number)
    for thread in threads:
        thread.join()
    assert answered == [12] * 6 and code == 0, said
    assert "Stopped." in said and "Traceback" not in said
    with pytest.raises(OSError):
        ask(server.url, ["a cat"])


@pytest.mark.thorough
def test_a_replica_that_cannot_start_is_an_error_in_one_line(run: Path, serving) -> None:
    settings = read_json(run / "run.json")
    settings["about"]["base_model"] = "/no/such/model"
    write_json(run / "run.json", settings)
    with pytest.raises(AssertionError, match=r"no replica could start: .*/no/such/model"):
        serving(run)
