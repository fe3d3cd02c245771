"""Runs that are opened again: their settings, their answers with and without the task's name, their statistics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.runs import RunSettings
from qtuning_fast.lifelong.saved_run import SavedRun
from qtuning_fast.lifelong.tasks import Examples
from qtuning_fast.lifelong.trainer import LifelongTrainer
from qtuning_fast.model.checked_files import read_json


def test_a_saved_run_has_its_settings_and_gives_its_accuracies_again(settings: RunSettings, finished_run: Path) -> None:
    saved = SavedRun(finished_run)
    assert saved.options == replace(settings.training, prompt_rate=3e-3) and saved.data == settings.data
    final = read_json(finished_run / "metrics.json")["task_adapter"]["accuracy_matrix"][-1]
    assert [saved.score(task.test, task.name) for task in saved.load_tasks()] == final
    chances = saved.predict(["the red one", "a green one", "the red one"], "colours")
    assert chances.shape == (3, 2) and chances[0].tolist() == pytest.approx(chances[2].tolist())


def test_a_saved_run_refuses_images_for_texts(finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task 'colours' reads texts, but these examples are images"):
        SavedRun(finished_run).score(Examples([tmp_path / "a.png"], [0]), "colours")


def test_a_run_from_python_is_opened_by_its_adapters(settings: RunSettings, tmp_path: Path) -> None:
    tasks = settings.data.load()[:1]
    LifelongTrainer(*load_base_model(settings.model), settings.method, tasks, settings.training, tmp_path / "run").run()
    with pytest.raises(ValueError, match=r"QTuningModel\.from_pretrained"):
        SavedRun(tmp_path / "run")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        SavedRun(tmp_path)


def test_without_names_it_gives_what_the_run_measured(finished_run: Path) -> None:
    saved, block = SavedRun(finished_run), read_json(finished_run / "metrics.json")["class_incremental"]["adapters"]
    found = [saved.score_unnamed(task.test, task.name) for task in saved.load_tasks()]
    assert [each["accuracy"] for each in found] == block["accuracy_matrix"][-1]
    assert [each["task_found"] for each in found] == block["task_found_matrix"][-1]
    assert saved.left_out == [] and saved.infers and saved.record_statistics() == []


def test_answers_count_by_the_names_of_their_labels(finished_run: Path) -> None:
    saved, tasks = SavedRun(finished_run), SavedRun(finished_run).load_tasks()
    names = saved.label_names
    assert names == list(dict.fromkeys([*tasks[0].label_names, *tasks[1].label_names]))
    texts = [*tasks[0].test.inputs, *tasks[1].test.inputs]
    true = [task.label_names[label] for task in tasks for label in task.test.labels]
    given = [saved.model.label_names(each.task)[int(each.output.argmax())] for each in saved.infer(texts)]
    found = saved.score_by_label(Examples(texts, [names.index(label) for label in true]))
    assert found["accuracy"] == pytest.approx(sum(a == b for a, b in zip(given, true)) / len(true))
    assert 0 <= found["known"] <= 1


def test_another_rule_may_be_tried_on_a_finished_run(finished_run: Path) -> None:
    saved = SavedRun(finished_run, task_rule="most-confident")
    answer = saved.infer(["the red one"])[0]
    sure = {name: float(saved.predict(["the red one"], name).max()) for name in saved.model.tasks}
    assert answer.task == max(sure, key=sure.__getitem__)
    needs = SavedRun(finished_run, task_rule="ranpac")
    assert needs.left_out == ["colours", "warm"] and not needs.infers
    with pytest.raises(ValueError, match=r"by which rule 'ranpac' infers .* --task-rule ranpac"):
        needs.infer(["the red one"])
    with pytest.raises(ValueError, match="top_k is 0"):
        saved.infer(["the red one"], top_k=0)


def test_the_rule_itself_may_answer(finished_run: Path) -> None:
    saved, block = SavedRun(finished_run, answers_by="rule"), read_json(finished_run / "metrics.json")
    found = [saved.score_unnamed(task.test, task.name)["accuracy"] for task in saved.load_tasks()]
    assert found == block["class_incremental"]["closed_form"]["accuracy_matrix"][-1]
    answer = saved.infer(["the red one"])[0]
    assert float(answer.output.sum()) == pytest.approx(1) and answer.probability <= answer.task_probability
    assert answer.task_probability + sum(p for _, p in answer.runners_up) == pytest.approx(1)
    assert answer.probability == pytest.approx(answer.task_probability * float(answer.output.max()))
    with pytest.raises(ValueError, match="top_k is 2, but rule answers"):
        saved.infer(["the red one"], top_k=2)
    with pytest.raises(ValueError, match="no head over all classes after 2 tasks, which a run has with --joint-head"):
        SavedRun(finished_run, answers_by="joint-head").infer(["the red one"])
    with pytest.raises(ValueError, match="answers_by is 'all'; it must be one of adapters, joint-head, rule"):
        SavedRun(finished_run, answers_by="all")


def test_an_answer_in_words_has_its_probabilities(finished_run: Path) -> None:
    saved = SavedRun(finished_run)
    found = saved.infer(["the red one"])[0]
    words = saved.in_words(found)
    assert f"task {found.task_probability:.0%}, both {found.probability:.0%}" in words
    assert words.startswith("no known task; the nearest is ") is not found.is_known
    ((other, p),) = found.runners_up
    assert f"(other tasks: {other} {p:.0%})" in words
