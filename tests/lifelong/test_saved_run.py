"""Runs that are opened again: their settings, their answers with and without the task's name, their statistics."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from qtuning_fast import QTuningConfig
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.lifelong.runs import RunSettings, run_stream
from qtuning_fast.lifelong.saved_run import SavedRun
from qtuning_fast.lifelong.tasks import Examples
from qtuning_fast.lifelong.trainer import LifelongTrainer
from qtuning_fast.model.checked_files import read_json

METHOD = QTuningConfig(prompt_length=2, shared_length=2, queue_size=2)
TRAINING = TrainingOptions(steps=2, batch_size=4, max_length=10, eval_every=2)


@pytest.fixture(scope="module")
def settings(toy_files: dict[str, Path], tiny_model_folder: Path) -> RunSettings:
    tasks = tuple(f"{name}={toy_files[name]}" for name in ("colours", "warm"))
    data = DataOptions(tasks=tasks, shots=4, validation_shots=3, test_size=8)
    return RunSettings(str(tiny_model_folder), data, METHOD, TRAINING)


@pytest.fixture(scope="module")
def folder(settings: RunSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    run_stream(settings, folder, lambda tasks, title: nullcontext(RunListener()))
    return folder


def test_a_saved_run_has_its_settings_and_gives_its_accuracies_again(settings: RunSettings, folder: Path) -> None:
    saved = SavedRun(folder)
    assert saved.options == TRAINING and saved.data == settings.data
    final = read_json(folder / "metrics.json")["task_adapter"]["accuracy_matrix"][-1]
    assert [saved.score(task.test, task.name) for task in saved.load_tasks()] == final
    chances = saved.predict(["the red one", "a green one", "the red one"], "colours")
    assert chances.shape == (3, 2) and chances[0].tolist() == pytest.approx(chances[2].tolist())


def test_a_saved_run_refuses_images_for_texts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task 'colours' reads texts, but these examples are images"):
        SavedRun(folder).score(Examples([tmp_path / "a.png"], [0]), "colours")


def test_a_run_from_python_is_opened_by_its_adapters(settings: RunSettings, tmp_path: Path) -> None:
    tasks = settings.data.load()[:1]
    LifelongTrainer(*load_base_model(settings.model), METHOD, tasks, TRAINING, tmp_path / "run").run()
    with pytest.raises(ValueError, match=r"QTuningModel\.from_pretrained"):
        SavedRun(tmp_path / "run")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        SavedRun(tmp_path)


def test_without_names_it_gives_what_the_run_measured(folder: Path) -> None:
    saved, block = SavedRun(folder), read_json(folder / "metrics.json")["class_incremental"]["adapters"]
    found = [saved.score_unnamed(task.test, task.name) for task in saved.load_tasks()]
    assert [each["accuracy"] for each in found] == block["accuracy_matrix"][-1]
    assert [each["task_found"] for each in found] == block["task_found_matrix"][-1]
    assert saved.left_out == [] and saved.infers and saved.record_statistics() == []


def test_answers_count_by_the_names_of_their_labels(folder: Path) -> None:
    saved, tasks = SavedRun(folder), SavedRun(folder).load_tasks()
    names = saved.label_names
    assert names == list(dict.fromkeys([*tasks[0].label_names, *tasks[1].label_names]))
    texts = [*tasks[0].test.inputs, *tasks[1].test.inputs]
    true = [task.label_names[label] for task in tasks for label in task.test.labels]
    given = [saved.model.label_names(each.task)[int(each.output.argmax())] for each in saved.infer(texts)]
    found = saved.score_by_label(Examples(texts, [names.index(label) for label in true]))
    assert found["accuracy"] == pytest.approx(sum(a == b for a, b in zip(given, true)) / len(true))
    assert 0 <= found["known"] <= 1


def test_another_rule_may_be_tried_on_a_finished_run(folder: Path) -> None:
    saved = SavedRun(folder, task_rule="most-confident")
    answer = saved.infer(["the red one"])[0]
    sure = {name: float(saved.predict(["the red one"], name).max()) for name in saved.model.tasks}
    assert answer.task == max(sure, key=sure.__getitem__)
    needs = SavedRun(folder, task_rule="ranpac")
    assert needs.left_out == ["colours", "warm"] and not needs.infers
    with pytest.raises(ValueError, match=r"by which rule 'ranpac' infers .* --task-rule ranpac"):
        needs.infer(["the red one"])
    with pytest.raises(ValueError, match="top_k is 0"):
        saved.infer(["the red one"], top_k=0)


def test_an_answer_in_words_has_its_probabilities(folder: Path) -> None:
    saved = SavedRun(folder)
    found = saved.infer(["the red one"])[0]
    words = saved.in_words(found)
    assert f"task {found.task_probability:.0%}, both {found.probability:.0%}" in words
    assert words.startswith("no known task; the nearest is ") is not found.is_known
    ((other, p),) = found.runners_up
    assert f"(other tasks: {other} {p:.0%})" in words
