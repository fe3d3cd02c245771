"""`push` and `pull`: a run goes from one machine to another through a stand-in hub, and what goes wrong is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qtuning_fast.cli import app

FAST = "--steps=2 --batch-size=4 --max-length=10 --eval-every=2 --prompt-length=2 --shared-length=2 --queue-size=2"
DRAW = "--shots=4 --validation-shots=3 --test-size=8"
REPO = "user/colours"


def call(*arguments: str) -> tuple[int, str, str]:
    """The exit code, what was printed, and what was printed of errors."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run(toy_files: dict[str, Path], tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    tasks = [f"--task={name}={toy_files[name]}" for name in ("colours", "warm")]
    code, _, said = call("run", f"--out={folder}", f"--model={tiny_model_folder}", *tasks, *FAST.split(), *DRAW.split())
    assert code == 0, said
    return folder


def test_a_run_goes_there_and_back(hub: Any, run: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    code, printed, said = call("push", f"--run={run}", REPO, "--private", "--license=mit", "--message=My colours")
    assert code == 0, said
    assert printed.startswith(f"Pushed: {hub.endpoint}/{REPO}/commit/")
    assert hub.repositories[REPO].private and hub.repositories[REPO].messages[-1] == "My colours"
    out = tmp_path / "pulled it"
    code, printed, said = call("pull", REPO, f"--out={out}", f"--base-model={tiny_model_folder}")
    assert code == 0, said
    assert printed == f"Pulled colours, warm into {out}\nTry it: qtuning-fast predict --run '{out}' \"a text\"\n"
    for arguments in (["predict", "the red one"], ["predict", "--task=warm", "a blue one"], ["eval"]):
        original, pulled = (call(*arguments, f"--run={folder}") for folder in (run, out))
        if arguments == ["eval"]:
            assert pulled[0] == 2 and "stayed with its author" in pulled[2]
        else:
            assert pulled == original and original[0] == 0


def test_what_is_said_of_what_cannot_be_predicted_with(hub: Any, run: Path, tmp_path: Path) -> None:
    assert call("push", f"--run={run}", REPO, "--task=warm", "--revision=one")[0] == 0
    code, printed, _ = call("pull", REPO, f"--out={tmp_path}/a", "--revision=one")
    assert code == 0 and "Pulled warm into" in printed and "pull it with --base-model" in printed
    code, _, said = call("predict", f"--run={tmp_path}/a", "a text")
    assert code == 2 and "--base-model" in said
    left = {name: content for name, content in hub.files(REPO, "one").items() if name != "run.json"}
    hub.repositories[REPO].commit(left, "one", "without the run")
    code, printed, _ = call("pull", REPO, f"--out={tmp_path}/b", "--revision=one")
    assert code == 0 and "QTuningModel.from_pretrained" in printed


def test_a_pull_request(hub: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("push", f"--run={run}", REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_guest")
    code, printed, _ = call("push", f"--run={run}", REPO, "--task=warm", "--create-pr")
    assert code == 0 and printed == f"Pushed: {hub.endpoint}/{REPO}/discussions/1\n"


@pytest.mark.parametrize(
    ("arguments", "token", "named"),
    [
        (["push", "--run={run}", "user/a b"], "hf_user", "'user/a b'; it must be user/name"),
        (["push", "--run={run}", REPO], "", "takes no token from you"),
        (["push", "--run={run}", REPO], "hf_nobody", "hf auth login"),
        (["push", "--run={run}", REPO], "hf_guest", "your token may not write to user/colours"),
        (["push", "--run={run}", REPO, "--task=cold"], "hf_user", "'cold' is not among"),
        (["push", "--run={tmp}/nothing", REPO], "hf_user", "nothing holds no run"),
        (["push", "--run={run}", REPO, "--base-model={run}"], "hf_user", "must be the name of a model on the hub"),
        (["push", REPO], "hf_user", "--run"),
        (["push", "--run={run}"], "hf_user", "USER/NAME"),
        (["pull", "user/none", "--out={tmp}/x"], "hf_user", "there is no repository user/none"),
        (["pull", "user/none", "--out={tmp}/x"], "", "there is no repository user/none"),
        (["pull", "user/a b", "--out={tmp}/x"], "hf_user", "it must be user/name"),
        (["pull", "user/there", "--out={tmp}/x", "--revision=old"], "hf_user", "no revision 'old'"),
        (["pull", "user/there", "--out={tmp}/x"], "hf_user", "user/there holds no adapter_config.json"),
        (["pull", "user/there", "--out={run}"], "hf_user", "is not an empty folder"),
        (["pull", "user/there"], "hf_user", "--out"),
    ],
)
def test_what_is_wrong_is_one_line_with_a_way_out(
    hub: Any, run: Path, tmp_path: Path, arguments: list[str], token: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    huggingface_hub.HfApi(endpoint=hub.endpoint).create_repo("user/there")
    monkeypatch.setenv("HF_TOKEN", token)
    code, printed, said = call(*(each.format(run=run, tmp=tmp_path) for each in arguments))
    assert code == 2 and named in said and not printed, said
    if said.startswith("error:"):
        assert said.count("\n") == 1
    assert list(hub.repositories) == ["user/there"] and not (tmp_path / "x").exists()


def test_without_a_network(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["push", f"--run={run}", REPO], ["pull", REPO, f"--out={tmp_path}/x"]):
        code, _, said = call(*arguments)  # all tests have HF_HUB_OFFLINE
        assert code == 2 and "HF_HUB_OFFLINE forbids to ask the hub" in said and said.count("\n") == 1


def test_an_interrupt_leaves_no_folder(hub: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("push", f"--run={run}", REPO)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qtuning_fast.lifelong.shared_run.write_checkpoint", interrupted)
    code, printed, _ = call("pull", REPO, f"--out={tmp_path}/x")
    assert code == 130 and "There is no folder yet" in printed and not (tmp_path / "x").exists()


def test_the_environment_names_the_hub(hub: Any, run: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """A process of its own, as a user has it: no setting is changed from inside."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_user",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    code = """
from typer.testing import CliRunner
from qtuning_fast.cli import app
for arguments in {}:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
print(result.stdout)
"""
    out = str(tmp_path / "pulled")
    commands = [
        ["push", f"--run={run}", REPO],
        ["pull", REPO, f"--out={out}", f"--base-model={tiny_model_folder}"],
        ["predict", f"--run={out}", "--task=colours", "the red one"],
    ]
    command = [sys.executable, "-c", code.format(commands)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "colours: " in result.stdout and "run.json" in hub.files(REPO)
