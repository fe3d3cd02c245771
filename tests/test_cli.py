"""The command line: whole runs, killed runs, and inputs that no one should type."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from qtuning_fast.cli import app
from qtuning_fast.model.checked_files import read_json, write_json

FAST = "--steps 6 --batch-size 4 --max-length 10 --eval-every 2 --prompt-length 2 --shared-length 2 --queue-size 2"
DRAW = "--shots 4 --validation-shots 3 --test-size 12"
TIMES = {"seconds", "start_seconds", "step_seconds"}

Command = Callable[..., list[str]]


@pytest.fixture(scope="session")
def command(toy_files: dict[str, Path], tiny_model_folder: Path) -> Command:
    def run_command(out: Path, *more: str, tasks: int = 3) -> list[str]:
        named = [f"--task={name}={path}" for name, path in list(toy_files.items())[:tasks]]
        return ["run", f"--out={out}", f"--model={tiny_model_folder}", *named, *FAST.split(), *DRAW.split(), *more]

    return run_command


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="session")
def finished(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toy"
    code, output = call(*command(folder))
    assert code == 0, output
    assert "report.html" in output and "colours" in output
    return folder


def results(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["checksum"]  # of the times, too
    for task in metrics["per_task"]:
        for name in TIMES:
            del task[name]
    return metrics


# What it does


def test_a_run_leaves_metrics_a_report_and_pictures(finished: Path) -> None:
    assert results(finished)["tasks"] == ["colours", "animals", "warm"]
    assert "<html" in (finished / "report.html").read_text()
    assert len(list((finished / "plots").glob("*.png"))) >= 8


def test_the_same_command_again_trains_nothing(finished: Path, command: Command) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*.json") if path.name != "metrics.json"}

    before = results(finished), written()
    code, output = call(*command(finished))
    assert code == 0, output
    assert (results(finished), written()) == before


def test_eval_gives_the_accuracies_of_the_run(finished: Path) -> None:
    code, output = call("eval", f"--run={finished}")
    assert code == 0, output
    for accuracy in results(finished)["task_adapter"]["accuracy_matrix"][-1]:
        assert f"{accuracy:.3f}" in output


def test_eval_on_data_of_ones_own(finished: Path, tmp_path: Path) -> None:
    data = tmp_path / "mine.csv"
    data.write_text("text,label\nthe red one,red\nthe green one,green\n")
    code, output = call("eval", f"--run={finished}", "--task=colours", f"--data={data}")
    assert code == 0 and "colours" in output
    data.write_text("text,label\nthe red one,red\nthe green one,purple\n")
    code, output = call("eval", f"--run={finished}", "--task=colours", f"--data={data}")
    assert code == 2 and "purple" in output


def test_predict_under_a_task_and_without_one(finished: Path) -> None:
    code, output = call("predict", f"--run={finished}", "--task=colours", "the red one", "the green one")
    assert code == 0 and output.count("colours:") == 2
    answer = r"(colours|animals|warm): \w+ \(\d+%\); task \d+%, both \d+% \(other tasks: \w+ \d+%, \w+ \d+%\)"
    for more in ([], ["--top-k=2"], ["--task-rule=most-confident"]):
        code, output = call("predict", f"--run={finished}", *more, "the red one")
        assert code == 0 and len(re.findall(answer, output)) == 1, output


def test_eval_without_a_task_infers_it(finished: Path, tmp_path: Path) -> None:
    block = results(finished)["class_incremental"]
    code, output = call("eval", f"--run={finished}")
    assert code == 0, output
    for kind in ("accuracy_matrix", "task_found_matrix"):
        assert all(f"{share:.3f}" in output for share in block["adapters"][kind][-1])
    data = tmp_path / "mine.csv"
    data.write_text("text,label\nthe red one,red\nthe cat was here,cat\n")
    code, output = call("eval", f"--run={finished}", f"--data={data}")
    assert code == 0 and "right label" in output and re.search(r"│ 2 │ (0.000|0.500|1.000) │", output), output
    data.write_text("text,label\nthe red one,purple\n")
    code, output = call("eval", f"--run={finished}", f"--data={data}")
    assert code == 2 and "purple" in output
    code, output = call("eval", f"--run={finished}", "--task=colours", "--top-k=2")
    assert code == 2 and "--top-k" in output and "--task names it" in output


def test_a_run_of_an_earlier_version_gets_its_statistics(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "an [old] run")
    index = read_json(folder / "adapter" / "adapter_config.json")
    kept = index["tasks"][0].pop("statistics")
    removed = [entry.pop("statistics") for entry in index["tasks"][1:]]
    write_json(folder / "adapter" / "adapter_config.json", index)
    code, output = call("predict", f"--run={folder}", "the red one")
    command = f"qtuning-fast statistics --run '{folder}'"
    assert code == 2 and command in output, output
    assert call("predict", f"--run={folder}", "--task=colours", "the red one")[0] == 0
    code, output = call("eval", f"--run={folder}")
    assert code == 0 and command in output and "not named" not in output.split("└")[0]
    index["tasks"][0]["statistics"] = kept
    write_json(folder / "adapter" / "adapter_config.json", index)
    code, output = call("predict", f"--run={folder}", "the red one")
    assert code == 0 and "colours:" in output and f"no statistics: animals, warm. Record them: {command}" in output
    code, output = call("statistics", f"--run={folder}")
    assert code == 0 and output == "Recorded for animals, warm."
    entries = read_json(folder / "adapter" / "adapter_config.json")["tasks"]
    assert [entry["statistics"] for entry in entries] == [kept, *removed], "to the bit"
    code, output = call("statistics", f"--run={folder}")
    assert code == 0 and "already" in output
    assert (
        call("predict", f"--run={folder}", "the red one")[1] == call("predict", f"--run={finished}", "the red one")[1]
    )


def test_labels_of_every_kind(command: Command, tmp_path: Path) -> None:
    draw, words = random.Random(0), ["the", "a", "is", "was", "seen", "here", "there"]
    topics, stars = tmp_path / "topics.csv", tmp_path / "stars.jsonl"
    texts = list(dict.fromkeys(" ".join(draw.choices([*words, "red", "cat"], k=6)) for _ in range(60)))
    rows = [f"{text},{';'.join(word for word in ('cat', 'red') if word in text.split())}" for text in texts]
    topics.write_text("\n".join(["text,label", *rows]))
    numbers = [{"text": text, "label": len(text) / 10} for text in texts]
    stars.write_text("\n".join(map(json.dumps, numbers)))
    out = tmp_path / "run"
    more = [f"--task={topics}", f"--task={stars}", "--problem-type=topics=multi_label_classification"]
    code, output = call(*command(out, *more, "--problem-type=stars=regression", "--shots=16", tasks=1))
    assert code == 0, output
    assert "average score" in output and "average accuracy" not in output.split("not named")[0]
    final = results(out)["task_adapter"]["accuracy_matrix"][-1]
    code, output = call("eval", f"--run={out}")
    assert code == 0 and all(word in output for word in ("accuracy", "micro-F1", "correlation"))
    assert all(f"{score:.3f}" in output for score in final)
    code, output = call("eval", f"--run={out}", "--task=stars", f"--data={stars}")
    assert code == 0 and "correlation" in output and str(len(texts)) in output, output
    code, output = call("predict", f"--run={out}", "the red cat was here")
    kinds = r"(topics: (none of cat, red|(cat|red) \(\d+%\).*)|stars: label -?[\d.]+|colours: \w+ \(\d+%\))"
    assert code == 0 and re.search(kinds + r"; task \d+%", output), output
    code, output = call("predict", f"--run={out}", "--task=stars", "the red cat was here")
    assert code == 0 and re.search(r"stars: label -?[\d.]+", output)
    sure = [more[0], more[2], "--task-rule=most-confident"]
    code, output = call(*command(tmp_path / "sure", *sure, tasks=1))
    assert code == 2 and "compares probabilities of classes, but task 'topics'" in output
    assert not (tmp_path / "sure").exists()
    code, output = call(*command(tmp_path / "other", more[1], "--problem-type=regresion", tasks=0))
    assert code == 2 and "regresion" in output and not (tmp_path / "other").exists()


def test_report_writes_the_report_again(finished: Path) -> None:
    (finished / "report.html").unlink()
    code, output = call("report", f"--run={finished}")
    assert code == 0 and (finished / "report.html").is_file(), output


def test_a_run_can_be_used_from_anywhere(
    command: Command, toy_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy_files["colours"].parent)
    arguments = [a.replace(str(toy_files["colours"]), "colours.csv") for a in command(tmp_path / "run", tasks=1)]
    assert "--task=colours=colours.csv" in arguments and call(*arguments)[0] == 0
    monkeypatch.chdir(tmp_path)
    code, output = call("eval", "--run=run")
    assert code == 0, output


def test_eval_refuses_data_that_changed(command: Command, tmp_path: Path) -> None:
    data = tmp_path / "mine.csv"
    rows = [f"{text},{label}" for label in ("x", "y") for text in (f"{word} {label}" for word in "abcdefghijklmnop")]
    data.write_text("\n".join(["text,label", *rows]))
    arguments = [*command(tmp_path / "run", tasks=0), f"--task=mine={data}"]
    assert call(*arguments)[0] == 0 and call("eval", f"--run={tmp_path}/run")[0] == 0
    data.write_text("\n".join(["text,label", *rows, *(f"new {word},a" for word in "abcdefghijklmnop")]))
    code, output = call("eval", f"--run={tmp_path}/run")
    assert code == 2 and "'mine' has changed" in output


@pytest.mark.thorough
def test_a_closed_pipe_does_not_stop_a_run(command: Command, tmp_path: Path) -> None:
    process = start(command(tmp_path / "run", tasks=2), stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=300) == 0 and (tmp_path / "run" / "report.html").is_file()


def test_several_seeds_do_not_go_into_the_folder_of_one(command: Command, finished: Path) -> None:
    code, output = call(*command(finished, "--seeds=2"))
    assert code == 2 and "one seed" in output


@pytest.mark.thorough
def test_a_packaged_stream_needs_no_datasets_package(tmp_path: Path, tiny_model_folder: Path) -> None:
    code = "import sys; sys.modules['datasets'] = None; from qtuning_fast.cli import main; main()"
    options = f"--stream=offline-5 --model={tiny_model_folder} --out={tmp_path}/run --test-size=10 {FAST}".split()
    command = [sys.executable, "-c", code, "run", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    command = [sys.executable, "-c", code, "eval", f"--run={tmp_path}/run", "--task=trec"]
    assert subprocess.run(command, capture_output=True, check=False, timeout=300).returncode == 0


def test_info_says_what_there_is() -> None:
    code, output = call("info")
    assert code == 0
    for expected in ("qtuning_fast", "torch", "cpu", "reference", "fused", "native", "composed"):
        assert expected in output


def test_several_seeds_report_mean_and_spread(command: Command, tmp_path: Path) -> None:
    code, output = call(*command(tmp_path / "run", "--seeds=2", tasks=2))
    assert code == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    values = [results(tmp_path / "run" / f"seed-{seed}")["task_adapter"]["average_accuracy"] for seed in (0, 1)]
    assert summary["task_adapter"]["average_accuracy"]["values"] == values
    assert (tmp_path / "run" / "report.html").is_file()


# Killed


def start(arguments: list[str], stdout: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    code = "from qtuning_fast.cli import main; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: the same sums in the same order
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def killed_and_resumed(command: Command, folder: Path, expected: Path, draw: random.Random) -> None:
    """Kill the run once its folder shows life, after a random while; then let the same command end it."""
    process = start(command(folder))
    while not (folder / "run.json").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 8))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    code, output = call(*command(folder))
    assert code == 0, output
    assert results(folder) == results(expected)


@pytest.mark.parametrize("trial", [0, *(pytest.param(trial, marks=pytest.mark.thorough) for trial in (1, 2))])
def test_killed_at_random_a_run_goes_on(command: Command, finished: Path, tmp_path: Path, trial: int) -> None:
    killed_and_resumed(command, tmp_path / "run", finished, random.Random(trial))


@pytest.mark.soak
@pytest.mark.parametrize("trial", range(3, 13))
def test_killed_at_random_a_run_goes_on_soak(command: Command, finished: Path, tmp_path: Path, trial: int) -> None:
    killed_and_resumed(command, tmp_path / "run", finished, random.Random(trial))


def test_a_method_by_name_is_its_settings_and_what_is_given_goes_first(command: Command, tmp_path: Path) -> None:
    code, output = call(*command(tmp_path / "run", "--method=progressive-prompts", "--gate=tanh"))
    assert code == 0, output
    method = json.loads((tmp_path / "run" / "run.json").read_text())["method"]
    wanted = {"eviction": None, "reweighting": None, "gate": "tanh", "shared_length": 2}  # the latter two are given
    assert {name: method[name] for name in wanted} == wanted
    title = "own data, progressive-prompts, shared_length=2, gate=tanh</title>"
    assert title in (tmp_path / "run" / "report.html").read_text()
    code, output = call(*command(tmp_path / "probe", "--method=probe"))
    assert code == 2 and "prompts would not be trained" in output  # the command gives lengths of prompts
    given = ("--prompt-length=0", "--shared-length=0", "--queue-size=1")
    code, output = call(*command(tmp_path / "probe", "--method=probe", *given))  # and a number of steps
    assert code == 0, output
    metrics = results(tmp_path / "probe")
    assert metrics["task_adapter"]["accuracy_matrix"][-1] == metrics["baselines"]["linear_probe"]["accuracy"]


def test_an_interrupt_says_how_to_go_on(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtuning_fast.lifelong.trainer import LifelongTrainer

    def interrupted(self: LifelongTrainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LifelongTrainer, "run", interrupted)
    code, output = call(*command(tmp_path / "run"))
    assert code == 130 and "same command" in output


# Inputs that are wrong. Each is refused before anything is written, and the message names the culprit.

BAD_NUMBERS = ["abc", "1.5.2", "", "nan", "-3"]
WRONG: dict[str, list[str]] = {
    "--method": ["lora", "", "Q-TUNING"],
    "--prompt-length": BAD_NUMBERS,
    "--queue-size": [*BAD_NUMBERS, "0", "90"],
    "--shared-length": BAD_NUMBERS,
    "--reweighting": ["full", ""],
    "--rank": [*BAD_NUMBERS, "0"],
    "--task-type": ["translation", "", "text-to-text", "causal-lm", "image-classification"],  # the model is a BERT
    "--gate": ["swish", "", "TANH"],
    "--gate-per": ["model", ""],
    "--gate-training": ["never", "first task"],
    "--layers": ["a", "0,,1", "-1", "0,0", "", "3"],
    "--reparameterization": ["lstm", ""],
    "--eviction": ["lru", ""],
    "--start-from": ["first", ""],
    "--retention-weight": ["abc", "-0.5", "nan", "inf", ""],
    "--steps": [*BAD_NUMBERS, "0"],
    "--batch-size": [*BAD_NUMBERS, "0"],
    "--max-length": [*BAD_NUMBERS, "0", "2", "65"],
    "--prompt-rate": ["abc", "-1", "nan", "inf"],
    "--head-rate": ["abc", "-1", "nan", "inf"],
    "--head-start": ["ones", ""],
    "--head-end": ["closed-form", ""],
    "--gate-rate": ["abc", "-1", "nan", "inf"],
    "--epochs": [*BAD_NUMBERS, "0"],
    "--augment": ["rotations", "crops", ""],  # the second is known, but these are texts
    "--contrast": ["abc", "-1", "nan", "inf"],
    "--joint-head": ["mean", ""],
    "--joint-epochs": [*BAD_NUMBERS, "0"],
    "--joint-rate": ["abc", "-1", "nan", "inf"],
    "--prompt-init": ["zeros", ""],
    "--prompt-momentum": ["abc", "-1", "nan", "2", "0.1"],  # the last is a number, but prompts pass through a network
    "--stream-data": ["/nowhere", "somewhere"],
    "--template": ["no slot", "music=Song: {text}", "{text}"],  # the model is a BERT, which reads none
    "--label-word": ["good", "nothing=else"],
    "--eval-every": [*BAD_NUMBERS, "0"],
    "--patience": BAD_NUMBERS,
    "--shots": [*BAD_NUMBERS, "0", "100000"],
    "--validation-shots": [*BAD_NUMBERS, "0", "100000"],
    "--test-size": [*BAD_NUMBERS, "0"],
    "--seed": BAD_NUMBERS,
    "--seeds": [*BAD_NUMBERS, "0"],
    "--stream": ["offline-5", "offline-7", ""],  # the first is known, but goes with no task of one's own
    "--task": ["x=nowhere.csv", "x=", "=", "", "x=/", "x=/dev/null", "colours=other.csv"],
    "--model": ["no/such/model", "/nowhere", ""],
    "--out": ["/dev/null", "/dev/null/run"],
    "--colour": ["red"],
}


@settings(
    max_examples=2000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_wrong_inputs_are_refused_by_name(data: st.DataObject, command: Command, tmp_path: Path) -> None:
    option = data.draw(st.sampled_from(sorted(WRONG)))
    values = st.sampled_from(WRONG[option])
    if option != "--out":  # a folder may have almost any name
        values |= st.sampled_from(["--", "\x00", "💥"])
    value = data.draw(values)
    out = tmp_path / "run"
    code, output = call(*command(out, f"{option}={value}"))
    assert code == 2, (option, value, output)
    name = option.removeprefix("--")
    path = value.partition("=")[2] or value
    spelled = {name, name.replace("-", "_"), f"{name.replace('-', '_')}s"}  # an option to repeat fills a list
    assert spelled & set(_words(output)) or path in output, (option, value, output)
    assert "Traceback" not in output and not out.exists()


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c in "-_" else " " for c in text).replace("--", " ").split()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run"], "--out"),
        (["run", "--out={tmp}/x"], "stream"),
        (["eval"], "--run"),
        (["eval", "--run={tmp}/nothing"], "nothing"),
        (["eval", "--run={run}", "--task=nothing"], "nothing"),
        (["eval", "--run={run}", "--data=x.csv"], "x.csv"),
        (["eval", "--run={run}", "--task-rule=nearest"], "nearest"),
        (["predict", "--run={run}", "--top-k=0", "a text"], "--top-k"),
        (["predict", "--run={run}", "--task-rule=ranpac", "a text"], "--task-rule ranpac"),
        (["run", "--out={tmp}/x", "--stream=offline-5", "--task-rule=best"], "best"),
        (["statistics", "--run={tmp}/nothing"], "nothing"),
        (["eval", "--run={run}", "--task=colours", "--data=nowhere.csv"], "nowhere"),
        (["predict", "--run={run}"], "text"),
        (["predict", "--run={run}", " "], "text"),
        (["predict", "--run={run}", "--task=nothing", "a text"], "nothing"),
        (["predict", "--run={tmp}/nothing", "a text"], "nothing"),
        (["report", "--run={tmp}/nothing"], "nothing"),
        (["dance"], "dance"),
    ],
)
def test_commands_that_cannot_be_done(arguments: list[str], named: str, finished: Path, tmp_path: Path) -> None:
    code, output = call(*(argument.format(tmp=tmp_path, run=finished) for argument in arguments))
    assert code == 2 and named in output, output
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_run_is_refused(damage: str, command: Command, finished: Path, tmp_path: Path) -> None:
    draw = random.Random(damage)
    for trial, path in enumerate(sorted((finished / "adapter").glob("[!.]*"))):
        folder = tmp_path / f"{trial}"
        shutil.copytree(finished, folder)
        damaged = folder / "adapter" / path.name
        content = bytearray(path.read_bytes())
        if damage == "truncate":
            content = content[: draw.randrange(len(content))]
        else:
            content[draw.randrange(len(content) // 2)] ^= 1
        damaged.write_bytes(content)
        code, output = call("predict", f"--run={folder}", "a text")
        assert code == 2 and "damaged" in output and path.name in output.replace(" ", ""), output
