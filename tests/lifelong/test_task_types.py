"""Every type of task by the command line: it learns, goes on where it was cut off, evaluates and predicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel
from typer.testing import CliRunner

from qtuning_fast import LifelongTrainer, QTuningConfig
from qtuning_fast.cli import app
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.data.loading import load_task
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.progress import _StepBar

TYPES = ["text-to-text", "causal-lm", "image-classification"]
# A queue of one prompt: memory retention begins with the second task.
FAST = "--steps 45 --batch-size 16 --max-length 10 --eval-every 15 --prompt-length 4 --shared-length 2 --queue-size 1"
DRAW = "--shots 12 --validation-shots 4 --test-size 16"
STEPS = 45

Folders = dict[str, Path]


class CutOff(BaseException):
    """Stands for whatever ends a process."""


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def commands(folders_of_models: Folders, toy_texts: Folders, toy_images: Folders) -> dict[str, list[str]]:
    return {
        task_type: [
            f"--task-type={task_type}",
            f"--model={folders_of_models[task_type]}",
            *(f"--task={n}={p}" for n, p in (toy_images if task_type.startswith("image") else toy_texts).items()),
            *FAST.split(),
            *DRAW.split(),
            f"--prompt-rate={0.01 if task_type.startswith('image') else 0.3}",
            *(["--augment=crops-brightness"] if task_type.startswith("image") else []),
            *(["--template=a {text} is", "--label-word=red=blue"] if task_type == "causal-lm" else []),
        ]
        for task_type in TYPES
    }


@pytest.fixture(scope="module")
def runs(commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A finished run of each type."""
    folder = tmp_path_factory.mktemp("runs")
    for task_type, arguments in commands.items():
        code, output = call("run", f"--out={folder / task_type}", *arguments)
        assert code == 0, output
    return {task_type: folder / task_type for task_type in TYPES}


def results(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["checksum"]
    for task in metrics["per_task"]:
        del task["seconds"], task["start_seconds"], task["step_seconds"]
    return metrics


@pytest.mark.parametrize("task_type", TYPES)
def test_it_learns(task_type: str, runs: Folders) -> None:
    metrics = results(runs[task_type])
    assert min(metrics["task_adapter"]["accuracy_matrix"][-1]) > 0.65, metrics["task_adapter"]
    assert metrics["task_adapter"]["average_accuracy"] > 0.8
    for task in metrics["per_task"]:
        curve = [loss for _, loss in task["loss_curve"]]
        assert curve[-1] < max(0.8 * curve[0], 0.2)  # a head in closed form may start that well
        assert [step for step, _ in task["validation_curve"]] == [0, 15, 30, 45]
    assert [bool(task["retention_curve"]) for task in metrics["per_task"]] == [False, True]
    assert min(metrics["baselines"]["linear_probe"]["accuracy"]) > 0.6
    assert metrics["config"]["method"]["task_type"] == task_type
    assert (runs[task_type] / "report.html").is_file()


@pytest.mark.parametrize(
    "task_type", [TYPES[0], *(pytest.param(each, marks=pytest.mark.thorough) for each in TYPES[1:])]
)
def test_cut_off_in_the_second_task_it_goes_on_to_the_same_end(
    task_type: str, runs: Folders, commands: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def cut_off(*_: Any, **__: Any) -> None:
        nonlocal steps
        steps += 1
        if steps > STEPS + 15:
            raise CutOff

    with monkeypatch.context() as patched, pytest.raises(CutOff):
        patched.setattr(_StepBar, "on_step_end", cut_off)
        call("run", f"--out={tmp_path / 'run'}", *commands[task_type])
    code, output = call("run", f"--out={tmp_path / 'run'}", *commands[task_type])
    assert code == 0, output
    assert results(tmp_path / "run") == results(runs[task_type])


@pytest.mark.parametrize("task_type", TYPES)
def test_eval_and_predict(task_type: str, runs: Folders, toy_images: Folders, tmp_path: Path) -> None:
    run = f"--run={runs[task_type]}"
    code, output = call("eval", run)
    assert code == 0, output
    for accuracy in results(runs[task_type])["task_adapter"]["accuracy_matrix"][-1]:
        assert f"{accuracy:.3f}" in output
    if task_type == "image-classification":
        asked, data = (
            [str(toy_images["colours"] / f"{label}/3.png") for label in ("red", "green")],
            toy_images["colours"],
        )
    else:
        asked, data = ["the old was red", "a very new is green"], tmp_path / "mine.csv"
        data.write_text("text,label\nthe old was red,red\na very new is green,green\n")
    code, output = call("predict", run, "--task=colours", *asked)
    assert code == 0 and "colours: red" in output and "colours: green" in output, output
    code, output = call("eval", run, "--task=colours", f"--data={data}")
    assert code == 0 and ("48 │ 1.000" if data.is_dir() else "2 │ 1.000") in output, output


@pytest.mark.parametrize("name", ["nothing.png", "text.png"])
def test_predict_of_what_is_no_image(name: str, runs: Folders, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("a text")
    code, output = call("predict", f"--run={runs['image-classification']}", str(tmp_path / name))
    assert code == 2 and name in output.replace(" ", ""), output


def test_label_words_of_ones_own_are_part_of_the_run(
    folders_of_models: Folders, toy_texts: Folders, tmp_path: Path
) -> None:
    task = load_task(f"pets={toy_texts['pets']}", shots=8, validation_shots=4, test_size=16)
    assert task.answers == ["new dog", "old cat"]
    words = replace(task, label_words=["new", "Old-fashioned"])
    assert words.answers == ["new", "Old-fashioned"]
    config = QTuningConfig(task_type="causal-lm", prompt_length=2, shared_length=0)
    options = TrainingOptions(steps=2, max_length=8)
    base = load_base_model(str(folders_of_models["causal-lm"]), "causal-lm")
    LifelongTrainer(*base, config, [words], options, tmp_path / "run").run()
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["training"]
    assert recorded["prompt_rate"] == 3e-2, "what the type of task stands for, whatever it will stand for later"
    LifelongTrainer(*base, config, [words], replace(options, prompt_rate=3e-2), tmp_path / "run").run()
    with pytest.raises(ValueError, match=r"another run .*label_words"):
        LifelongTrainer(*base, config, [task], options, tmp_path / "run").run()
    with pytest.raises(ValueError, match=r"'pets': label_words is .'old'."):
        replace(task, label_words=["old"])


def test_templates_are_part_of_the_run(runs: Folders, commands: dict[str, list[str]]) -> None:
    settings = json.loads((runs["causal-lm"] / "run.json").read_text())
    assert settings["templates"] == dict.fromkeys(settings["tasks"], "a {text} is")
    assert sorted(settings["label_words"]["colours"]) == ["blue", "green"]
    other = [each.replace("a {text} is", "the {text} is") for each in commands["causal-lm"]]
    code, output = call("run", f"--out={runs['causal-lm']}", *other)
    assert code == 2 and "holds another run" in output and "templates" in output, output


# What is wrong shows before anything is written.


@pytest.mark.parametrize(
    ("task_type", "model", "data", "message"),
    [
        ("text-to-text", "causal-lm", "texts", "cannot be loaded for task_type='text-to-text'"),
        ("causal-lm", "text-to-text", "texts", "cannot be loaded for task_type='causal-lm'"),
        ("causal-lm", "image-classification", "texts", "cannot be loaded for task_type='causal-lm'"),
        ("image-classification", "causal-lm", "images", "cannot be loaded for task_type='image-classification'"),
        ("sequence-classification", "image-classification", "texts", "cannot be loaded for task_type='sequence-"),
        ("image-classification", "image-classification", "texts", "'colours' holds texts, but task_type='image-"),
        ("text-to-text", "text-to-text", "images", "'colours' holds images, but task_type='text-to-text'"),
        ("translation", "text-to-text", "texts", "task_type is 'translation'; it must be one of"),
    ],
)
def test_what_does_not_go_together(
    task_type: str,
    model: str,
    data: str,
    message: str,
    folders_of_models: Folders,
    toy_texts: Folders,
    toy_images: Folders,
    tmp_path: Path,
) -> None:
    tasks = {"texts": toy_texts, "images": toy_images}[data]
    task = f"--task=colours={tasks['colours']}"
    out = tmp_path / "run"
    code, output = call("run", f"--out={out}", f"--task-type={task_type}", f"--model={folders_of_models[model]}", task)
    assert code == 2 and message in output and not out.exists(), output


@pytest.mark.parametrize("task_type", ["text-to-text", "causal-lm"])
def test_labels_that_are_the_same_to_the_tokenizer(task_type: str, folders_of_models: Folders, tmp_path: Path) -> None:
    data, out = tmp_path / "mine.csv", tmp_path / "run"
    rows = [f"a {word} {label},{label}" for word in "abcdefgh" for label in ("sad", "glad")]
    data.write_text("\n".join(["text,label", *rows]))
    model = f"--model={folders_of_models[task_type]}"
    code, output = call("run", f"--out={out}", f"--task-type={task_type}", model, f"--task=moods={data}")
    assert code == 2 and not out.exists(), output
    assert "task 'moods': the label words 'glad' and 'sad' cannot be told apart" in output


def test_images_need_an_image_processor(folders_of_models: Folders, toy_images: Folders, tmp_path: Path) -> None:
    model, _ = load_base_model(str(folders_of_models["image-classification"]), "image-classification")
    model.save_pretrained(tmp_path / "model")
    arguments = ["--task-type=image-classification", f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'run'}"]
    code, output = call("run", *arguments, f"--task={toy_images['colours']}")
    assert code == 2 and "task_type='image-classification'" in output and not (tmp_path / "run").exists(), output
    task = load_task(str(toy_images["colours"]), shots=4)
    _, tokenizer = load_base_model(str(folders_of_models["causal-lm"]), "causal-lm")
    with pytest.raises(TypeError, match="needs an image processor"):
        config = QTuningConfig(task_type="image-classification")
        LifelongTrainer(model, tokenizer, config, [task], TrainingOptions(), tmp_path / "run")


def test_a_language_model_that_sees_what_follows_is_refused(
    make_tokenizer: Any, toy_texts: Folders, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    bert = BertLMHeadModel(BertConfig(**sizes, vocab_size=16)).eval()
    task = load_task(f"colours={toy_texts['colours']}", shots=4)
    run = LifelongTrainer(
        bert,
        make_tokenizer(decoder=True),
        QTuningConfig(task_type="causal-lm"),
        [task],
        TrainingOptions(),
        tmp_path / "r",
    )
    with pytest.raises(ValueError, match="needs a decoder"):
        run.run()
    assert not (tmp_path / "r").exists()
