"""Runs that are pushed to a stand-in hub and pulled somewhere else, without what is their author's alone."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.lifelong.runs import RunSettings, run_stream
from qtuning_fast.lifelong.saved_run import SavedRun
from qtuning_fast.lifelong.shared_run import eval_results, pull_run, push_run, shared_settings
from qtuning_fast.lifelong.tasks import Examples
from qtuning_fast.lifelong.trainer import LifelongTrainer
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.model import CorruptFileError, HubError
from qtuning_fast.model.checked_files import read_json, write_json, write_tensors

REPO = "user/colours"
TEXTS = ["the red one", "a green one", "here was blue"]


def changed(hub: Any, tmp_path: Path, name: str, **changes: Any) -> None:
    """Change a JSON file of the repository, with a right checksum."""
    path = tmp_path / "changed" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(hub.files(REPO)[name])
    write_json(path, read_json(path) | changes)
    hub.repositories[REPO].commit(hub.files(REPO) | {name: path.read_bytes()}, "main", f"changed {changes}")


def test_a_run_that_is_pulled_answers_as_its_original(
    hub: Any, finished_run: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    push_run(finished_run, REPO, license="mit", data_license="cc0-1.0")
    found = pull_run(REPO, tmp_path / "pulled", base_model=str(tiny_model_folder))
    assert found.tasks == ["colours", "warm"] and found.is_run and found.base_model == str(tiny_model_folder)
    original, pulled = SavedRun(finished_run), SavedRun(tmp_path / "pulled")
    for task in original.model.tasks:
        assert torch.equal(pulled.predict(TEXTS, task), original.predict(TEXTS, task))
    assert [pulled.in_words(each) for each in pulled.infer(TEXTS)] == list(
        map(original.in_words, original.infer(TEXTS))
    )
    assert pulled.record_statistics() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub-cache", "pulled"]


def test_what_is_pushed_has_no_paths_and_no_texts(
    hub: Any, finished_run: Path, toy_files: dict[str, Path], tiny_model_folder: Path
) -> None:
    push_run(finished_run, REPO)
    text = toy_files["colours"].read_text().splitlines()[1].partition(",")[0]
    for name, content in hub.files(REPO).items():
        for secret in (text, str(toy_files["colours"].parent), str(tiny_model_folder), str(finished_run)):
            assert secret.encode() not in content, name
    settings = json.loads(hub.files(REPO)["run.json"])
    assert settings["about"]["data"]["tasks"] == ["colours=colours.csv", "warm=warm.csv"]
    assert settings["about"]["base_model"] is None and settings["about"]["shared"]


def test_the_page_has_what_the_run_measured(hub: Any, finished_run: Path) -> None:
    push_run(finished_run, REPO, base_model="someone/tiny-bert", license="mit", data_license="cc0-1.0")
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    measured = read_json(finished_run / "metrics.json")
    accuracy = measured["task_adapter"]["accuracy_matrix"][-1]
    unnamed = measured["class_incremental"]["adapters"]["average_accuracy"]
    found = {each.dataset_name: each.metric_value for each in card.data.eval_results}
    assert found == {"colours": accuracy[0], "warm": accuracy[1], "all tasks, not named": round(unnamed, 4)}
    assert card.data.license == "mit" and card.data.base_model == "someone/tiny-bert"
    assert f"| colours | accuracy | {accuracy[0]:.3f} |" in card.text and "- Data of the tasks: cc0-1.0." in card.text
    assert json.loads(hub.files(REPO)["run.json"])["about"]["base_model"] == "someone/tiny-bert"


def test_the_examples_stay_with_the_author_unless_they_are_at_hand(
    hub: Any,
    finished_run: Path,
    tiny_model_folder: Path,
    toy_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push_run(finished_run, REPO)
    pull_run(REPO, tmp_path / "pulled", base_model=str(tiny_model_folder))
    saved = SavedRun(tmp_path / "pulled")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"examples of this run stayed with its author \(there is no file or folder colours\.csv\); .*--data",
    ):
        saved.load_tasks()
    (tmp_path / "colours.csv").write_text("said,label\na,b")
    with pytest.raises(ValueError, match="column") as broken:  # the reader's own file is what must be mended
        saved.load_tasks()
    assert "stayed with its author" not in str(broken.value)
    for name in ("colours", "warm"):
        shutil.copy(toy_files[name], tmp_path)
    accuracy = read_json(finished_run / "metrics.json")["task_adapter"]["accuracy_matrix"][-1]
    assert [saved.score(task.test, task.name) for task in saved.load_tasks()] == accuracy


def test_one_task_of_a_run(hub: Any, finished_run: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    push_run(finished_run, REPO, task="warm")
    assert pull_run(REPO, tmp_path / "pulled", base_model=str(tiny_model_folder)).tasks == ["warm"]
    pulled = SavedRun(tmp_path / "pulled")
    assert torch.equal(pulled.predict(TEXTS, "warm"), SavedRun(finished_run).predict(TEXTS, "warm"))
    assert {each.task for each in pulled.infer(TEXTS)} == {"warm"}
    with pytest.raises(ValueError, match="task 'cold' is not among the finished tasks: colours, warm"):
        push_run(finished_run, REPO, task="cold")
    push_run(tmp_path / "pulled", "user/again")  # what was pulled can be pushed
    assert json.loads(hub.files("user/again")["run.json"])["tasks"].keys() == {"warm"}


def test_the_head_over_all_classes_comes_along(
    hub: Any, settings: RunSettings, tiny_model_folder: Path, tmp_path: Path
) -> None:
    training = replace(settings.training, joint_head="variance", joint_epochs=1)
    run = tmp_path / "run"
    hide = replace(settings, training=training, method_name="hide")
    metrics = run_stream(hide, run, lambda tasks, title: nullcontext(RunListener()))
    metrics["class_incremental"]["joint_head"]["average_accuracy"] = 0.125  # told from that of the adapters
    write_json(run / "metrics.json", metrics)
    push_run(run, REPO)
    pull_run(REPO, tmp_path / "pulled", base_model=str(tiny_model_folder))
    original, pulled = (SavedRun(each, answers_by="joint-head") for each in (run, tmp_path / "pulled"))
    expected = [each.output.tolist() for each in original.infer(TEXTS)]
    assert [each.output.tolist() for each in pulled.infer(TEXTS)] == expected
    page = ModelCard(hub.files(REPO)["README.md"].decode())
    told = {each.dataset_name: each.metric_value for each in page.data.eval_results}
    assert told["all tasks, not named"] == 0.125
    push_run(tmp_path / "pulled", "user/again")
    assert [name for name in hub.files("user/again") if name.startswith("head-")]
    for pushed in (run, tmp_path / "pulled"):
        push_run(pushed, REPO, task="warm")
        assert not [name for name in hub.files(REPO) if name.startswith("head-")]
        one = pull_run(REPO, tmp_path / f"one of {pushed.name}", base_model=str(tiny_model_folder))
        assert one.tasks == ["warm"]


def test_a_head_for_other_features_is_refused(
    hub: Any, settings: RunSettings, tiny_model_folder: Path, tmp_path: Path
) -> None:
    training = replace(settings.training, joint_head="variance", joint_epochs=1)
    run = tmp_path / "run"
    run_stream(replace(settings, training=training), run, lambda tasks, title: nullcontext(RunListener()))
    push_run(run, REPO)
    pull_run(REPO, tmp_path / "pulled", base_model=str(tiny_model_folder))
    classes = sum(len(SavedRun(run).model.label_names(name)) for name in ("colours", "warm"))
    entry = write_tensors(tmp_path, "head", {"weight": torch.ones(classes, 3), "bias": torch.ones(classes)})
    content = (tmp_path / entry["file"]).read_bytes()
    hub.repositories[REPO].commit(hub.files(REPO) | {entry["file"]: content}, "main", "another head")
    changed(hub, tmp_path, "run.json", joint_head=entry)
    with pytest.raises(CorruptFileError, match=r"holds a head for 3 features, but the model has \d+"):
        pull_run(REPO, tmp_path / "other")
    shutil.copy(tmp_path / entry["file"], tmp_path / "pulled")
    write_json(tmp_path / "pulled" / "run.json", read_json(tmp_path / "pulled" / "run.json") | {"joint_head": entry})
    with pytest.raises(CorruptFileError, match=r"holds a head for 3 features"):
        SavedRun(tmp_path / "pulled", answers_by="joint-head").infer(TEXTS)


@pytest.mark.parametrize("chat", [False, True])
def test_the_python_of_a_page_asks_a_language_model_as_in_training(
    hub: Any, folders_of_models: dict[str, Path], toy_texts: dict[str, Path], tmp_path: Path, chat: bool
) -> None:
    model = shutil.copytree(folders_of_models["causal-lm"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ bos_token }}old {{ messages[0]['content'] }} new "
    tokenizer.save_pretrained(model)
    settings = RunSettings(
        str(model),
        DataOptions(
            tasks=tuple(f"{name}={toy_texts[name]}" for name in ("pets", "colours")),
            shots=2,
            validation_shots=2,
            test_size=4,
            templates=("pets=was {text}\\nis", "colours={text}"),
            label_words=("old_cat=cat", "new-dog=dog", "red=blue"),
        ),
        QTuningConfig(task_type="causal-lm", prompt_length=2, shared_length=2, queue_size=2),
        TrainingOptions(steps=1, batch_size=4, max_length=12, eval_every=1, chat=chat),
    )
    run = tmp_path / "run"
    run_stream(settings, run, lambda tasks, title: nullcontext(RunListener()))
    push_run(run, REPO, task="pets")
    page = hub.files(REPO)["README.md"].decode()
    assert "'dog', 'cat'" in page and "'was {text}\\nis'" in page and "| colours |" not in page
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    told: dict[str, Any] = {}
    exec(code.replace("path/to/the/base-model", str(model)), told)
    encoder = SavedRun(run).encoder
    asked = encoder.as_asked(encoder.encode(Examples(["a text"], [0])), "was {text}\nis").columns
    assert told["inputs"]["input_ids"][0].tolist() == asked["input_ids"][asked["attention_mask"].bool()].tolist()
    assert pull_run(REPO, tmp_path / "pulled", base_model=str(model)).tasks == ["pets"]
    assert read_json(tmp_path / "pulled" / "run.json")["about"]["data"]["label_words"] == ["old_cat=cat", "new-dog=dog"]
    shutil.copy(toy_texts["pets"], tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert [task.name for task in SavedRun(tmp_path / "pulled").load_tasks()] == ["pets"]


def test_a_run_whose_base_model_was_a_folder_says_so(hub: Any, finished_run: Path, tmp_path: Path) -> None:
    push_run(finished_run, REPO)
    assert pull_run(REPO, tmp_path / "pulled").base_model is None
    with pytest.raises(ValueError, match=r"the base model of this run was a folder of its author; .* --base-model"):
        SavedRun(tmp_path / "pulled")


def test_a_run_from_python_is_pushed_as_a_model(hub: Any, settings: RunSettings, tmp_path: Path) -> None:
    tasks = settings.data.load()[:1]
    LifelongTrainer(*load_base_model(settings.model), settings.method, tasks, settings.training, tmp_path / "run").run()
    push_run(tmp_path / "run", REPO)
    assert "run.json" not in hub.files(REPO)
    found = pull_run(REPO, tmp_path / "pulled")
    assert found.tasks == ["colours"] and not found.is_run
    with pytest.raises(FileNotFoundError, match="holds no run"):
        SavedRun(tmp_path / "pulled")


def test_what_cannot_be_pushed(hub: Any, finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        push_run(tmp_path, REPO)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(finished_run / "run.json", begun)
    with pytest.raises(FileNotFoundError, match="no task of this run is finished"):
        push_run(begun, REPO)
    large = shutil.copytree(finished_run, tmp_path / "large")
    run = read_json(large / "run.json")
    write_json(large / "run.json", run | {"training": run["training"] | {"max_length": 200_000}})
    with pytest.raises(ValueError, match="has max_length 200000; 131072 is the most for a shared run"):
        push_run(large, REPO)
    damaged = shutil.copytree(finished_run, tmp_path / "damaged")
    file = next((damaged / "adapter").glob("task-001-*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match=f"{file.name} is damaged"):
        push_run(damaged, REPO)
    assert not hub.repositories


def test_a_folder_that_is_not_empty_is_left_alone(hub: Any, finished_run: Path, tmp_path: Path) -> None:
    push_run(finished_run, REPO)
    hub.asked.clear()
    for out in (finished_run, finished_run / "run.json"):
        with pytest.raises(ValueError, match="which is there and is not an empty folder"):
            pull_run(REPO, out)
    assert not hub.asked
    (tmp_path / "empty").mkdir()
    assert pull_run(REPO, tmp_path / "empty").is_run


def test_a_pull_that_breaks_off_leaves_no_folder_and_the_next_one_is_whole(
    hub: Any, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_run(finished_run, REPO)
    out = tmp_path / "pulled"
    hub.fail("GET", "/cdn/", cut_after=10, times=100)
    with pytest.raises(HubError, match="broke off"):
        pull_run(REPO, out)
    hub.faults.clear()

    def fail(error: BaseException) -> Any:
        def raising(*_: Any) -> None:
            raise error

        return raising

    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr("qtuning_fast.lifelong.shared_run.shutil.copyfile", fail(error))
            with pytest.raises((HubError, KeyboardInterrupt), match="the disk is full" if error.args else None):
                pull_run(REPO, out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hub-cache"]
    assert pull_run(REPO, out).tasks == ["colours", "warm"] and (out / "README.md").is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"about": None},
        {"about": {"base_model": 3, "data": {}}},
        {"about": {"base_model": "x"}},
        {"tasks": []},
        {"joint_head": "x"},
        {"templates": ["{text}"]},
        {"templates": {"task": 1}},
        {"label_words": {"task": "word"}},
        {"label_words": {"task": [1]}},
        {"joint_head": {"file": "../run.json", "sha256": "0" * 64}},
        {"joint_head": {}},
        {"training": {"max_length": 1_000_000_000}},
        {"training": {"eval_batch_size": 1_000_000_000}},
        {"training": {"max_length": "long"}},
        {"training": {"unheard_of": 1}},
        {"about": {"base_model": "x", "data": {"unheard_of": 1}}},
    ],
)
def test_settings_that_were_tampered_with_are_refused(
    hub: Any, finished_run: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    push_run(finished_run, REPO)
    changed(hub, tmp_path, "run.json", **changes)
    with pytest.raises(CorruptFileError):
        pull_run(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_settings_for_others() -> None:
    data = {
        "stream": None,
        "tasks": ["a=/home/me/a.csv", "/home/me/b", "c=glue:sst2", "d=C:\\me\\d.csv"],
        "problem_types": ["regression", "a=regression", "c=regression"],
        "stream_data": "/home/me/data",
        "templates": ["{text}", "a=A: {text}", "d=D: {text}"],
        "label_words": ["good=fine", "best=great", "a/bad=poor", "d/bad=sad"],
    }
    about = {"base_model": "/home/me/model", "data": data, "answered_by": "joint_head", "host": "mine"}
    settings = {"about": about, "tasks": dict.fromkeys("abcd", "digest"), "label_words": {"a": [], "d": []}, "x": 1}
    settings["joint_head"] = {"file": "head-0.safetensors"}
    settings["templates"] = {"a": "A: {text}", "d": "D: {text}"}
    for tasks in ("abcd", "cd"):
        found = shared_settings(settings, dict.fromkeys(tasks, ("good", "bad")), "some/model", alone=tasks == "cd")
        specs = {"a": "a=a.csv", "b": "b=./b", "c": "c=glue:sst2", "d": "d=d.csv"}
        assert found["about"]["data"]["tasks"] == [specs[name] for name in tasks]
        assert set(found["about"]) - {"answered_by"} == {"base_model", "data", "shared"} and found["x"] == 1
        assert ("answered_by" in found["about"]) is (tasks == "abcd") and list(found["tasks"]) == list(tasks)
    assert found["about"]["data"]["problem_types"] == ["regression", "c=regression"]
    assert found["about"]["data"]["templates"] == ["{text}", "d=D: {text}"]
    assert found["about"]["data"]["label_words"] == ["good=fine", "d/bad=sad"]
    assert found["templates"] == {"d": "D: {text}"} and "joint_head" not in found
    unknown = shared_settings(settings, {"c": (), "d": ("good",)}, "some/model", alone=True)
    assert unknown["about"]["data"]["label_words"] == ["good=fine", "best=great", "d/bad=sad"]
    assert found["label_words"] == {"d": []} and settings["about"]["data"] is data and len(data["tasks"]) == 4


def test_results_in_the_words_of_the_hub(make_metrics: Any) -> None:
    metrics = make_metrics(3)
    metrics["per_task"][1]["metric"] = "micro_f1"
    found = eval_results(metrics, metrics["tasks"], "sequence-classification")
    assert [each.metric_type for each in found] == ["accuracy", "f1", "accuracy", "accuracy"]
    assert {each.task_type for each in found} == {"text-classification"}
    some = eval_results(metrics, metrics["tasks"][:2], "sequence-classification")
    assert [each.dataset_name for each in some] == metrics["tasks"][:2]
    block = metrics["class_incremental"]
    block["joint_head"] = block["adapters"] | {"average_accuracy": 0.25}
    for answered_by, value in (
        ("joint_head", 0.25),
        ("adapters", round(block["adapters"]["average_accuracy"], 4)),
        ("nearest_class_mean", round(block["baselines"]["nearest_class_mean"]["average_accuracy"], 4)),
    ):
        told = eval_results(metrics, metrics["tasks"], "sequence-classification", answered_by=answered_by)
        assert told[-1].dataset_type == "all-tasks" and told[-1].metric_value == value
    assert len(eval_results(metrics, metrics["tasks"], "sequence-classification", answered_by="ranpac")) == 3
    older = make_metrics(3, class_incremental=False)
    assert len(eval_results(older, older["tasks"], "image-classification")) == 3
