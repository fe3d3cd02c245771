"""What a run measures without the task's name, recomputed one example at a time from what the run has saved."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qtuning_fast import LifelongTrainer, QTuningConfig, QTuningModel
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.data.encoding import ExampleEncoder
from qtuning_fast.lifelong.data.loading import load_task
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.tasks import SPLITS, Examples, Task
from qtuning_fast.method.labels import MULTI
from qtuning_fast.method.task_rule import TaskRule
from qtuning_fast.method.task_rules import RanPAC
from qtuning_fast.model.checked_files import read_json, write_json

METHOD = QTuningConfig(prompt_length=2, shared_length=2, queue_size=3)
TRAINING = TrainingOptions(steps=4, batch_size=4, max_length=10, eval_every=2, prompt_rate=0.03, head_rate=0.03)
STAGE = "class_incremental.json"


@pytest.fixture(scope="module")
def tasks(toy_files: dict[str, Path]) -> list[Task]:
    return [
        load_task(f"{name}={toy_files[name]}", shots=6, validation_shots=4, test_size=8)
        for name in ("colours", "animals", "warm")
    ]


def lifelong(model: Path, tasks: list[Task], folder: Path, **more: Any) -> LifelongTrainer:
    return LifelongTrainer(*load_base_model(str(model)), METHOD, tasks, TRAINING, folder, **more)


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tasks: list[Task], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unnamed") / "run"
    lifelong(tiny_model_folder, tasks, folder).run()
    return folder


@torch.no_grad()
def one_by_one(run: Path, model_folder: Path, tasks: list[Task], known: int) -> tuple[list[float], list[float]]:
    """Accuracy and share of tasks found, with `known` tasks, each example alone and by `task_names="infer"`."""
    base, tokenizer = load_base_model(str(model_folder))
    model = QTuningModel.from_pretrained(base, run / "adapter").eval()
    for task in tasks[known:]:
        if task.name != model.learning.last_learned:
            model.remove_task(task.name)
        else:
            model.learning.last_learned = None
            model.remove_task(task.name)
    encoder = ExampleEncoder(tokenizer, METHOD.task_type, TRAINING.max_length)
    right, found = [], []
    for task in tasks[:known]:
        encoded = encoder.encode(task.test)
        answers = []
        for batch in encoded.batches(1, torch.device("cpu")):
            output = model(**batch, task_names="infer")
            answers.append((model.tasks[int(output.task_index)], int(output.logits.argmax())))
        right.append(sum(a == (task.name, label) for a, label in zip(answers, task.test.labels)) / len(answers))
        found.append(sum(name == task.name for name, _ in answers) / len(answers))
    return right, found


@pytest.mark.parametrize("known", [1, 2, 3])
def test_accuracy_after_each_task_is_what_one_by_one_gives(
    known: int, run: Path, tiny_model_folder: Path, tasks: list[Task]
) -> None:
    block = read_json(run / "metrics.json")["class_incremental"]
    right, found = one_by_one(run, tiny_model_folder, tasks, known)
    assert block["adapters"]["accuracy_matrix"][known - 1][:known] == pytest.approx(right)
    assert block["adapters"]["task_found_matrix"][known - 1][:known] == pytest.approx(found)


def test_the_block_holds_what_it_must(run: Path) -> None:
    block = read_json(run / "metrics.json")["class_incremental"]
    assert block["rule"] == "closed-form" and block["classes"] == [2, 3, 2]
    for result in (block["adapters"], block["closed_form"], block["baselines"]["nearest_class_mean"]):
        last = result["accuracy_matrix"][-1]
        assert result["average_accuracy"] == pytest.approx(sum(last) / 3)
        assert 0 <= result["average_accuracy"] <= result["task_found"] <= 1
        assert result["average_accuracy"] <= result["label_accuracy"] <= 1
    assert len(block["baselines"]["joint_regression"]["accuracy"]) == 3
    assert [sum(row) for row in block["confusion"]] == pytest.approx([1, 1, 1])
    shares = [block["confusion"][task][task] for task in range(3)]
    assert shares == pytest.approx(block["adapters"]["task_found_matrix"][-1])
    assert sum(count for *_, count in block["calibration"]["bins"]) == 24
    unknown = block["unknown"]
    assert len(unknown["auroc"]) == len(unknown["detected"]) == 3 and unknown["false_alarm_rate"] == pytest.approx(
        1 / 29
    )
    json.dumps(block, allow_nan=False)


def test_cut_off_before_any_stage_it_gives_the_same_block(
    run: Path, tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    expected = read_json(run / "metrics.json")["class_incremental"]
    stages = sorted(run.glob(f"tasks/*/{STAGE}"))
    for cut in range(len(stages)):
        folder = shutil.copytree(run, tmp_path / f"cut-{cut}")
        (folder / "metrics.json").unlink()
        for stage in stages[cut:]:
            (folder / stage.relative_to(run)).unlink()
        assert lifelong(tiny_model_folder, tasks, folder).run()["class_incremental"] == expected


def test_a_run_of_an_earlier_version_gets_its_statistics_when_it_goes_on(
    run: Path, tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    folder = shutil.copytree(run, tmp_path / "old")
    for stage in folder.glob(f"tasks/*/{STAGE}"):
        stage.unlink()
    index = read_json(folder / "adapter" / "adapter_config.json")
    for entry in index["tasks"]:
        (folder / "adapter" / entry.pop("statistics")["file"]).unlink()
    write_json(folder / "adapter" / "adapter_config.json", index)
    metrics = lifelong(tiny_model_folder, tasks, folder).run()
    assert metrics["class_incremental"] == read_json(run / "metrics.json")["class_incremental"]
    assert all("statistics" in entry for entry in read_json(folder / "adapter" / "adapter_config.json")["tasks"])


class LastByName(TaskRule):
    """Always the task that is last by name, and its first class."""

    name = "last-by-name"

    def fit(self, candidates: Any) -> Any:
        classes = sum(each.classes for each in candidates)
        chosen = torch.full((classes,), -torch.inf, dtype=torch.float64)
        chosen[classes - candidates[-1].classes] = 0
        return lambda evidence: chosen.expand(len(evidence.features), -1)


def test_another_rule_chooses_and_the_closed_form_stays_beside_it(
    run: Path, tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    usual = read_json(run / "metrics.json")["class_incremental"]
    block = lifelong(tiny_model_folder, tasks, tmp_path / "run", task_rule=LastByName()).run()["class_incremental"]
    assert block["rule"] == "last-by-name"
    assert block["confusion"] == [[0, 0, 1]] * 3, "colours, animals, warm"
    assert block["adapters"]["task_found_matrix"] == [[1, None, None], [1, 0, None], [0, 0, 1]]
    assert block["closed_form"] == usual["closed_form"] and block["baselines"] == usual["baselines"]
    with pytest.raises(ValueError, match="task_rule: was 'last-by-name', now None"):
        lifelong(tiny_model_folder, tasks, tmp_path / "run").run()


@pytest.mark.parametrize("rule", ["ranpac", "most-confident"])
def test_rules_that_need_more_than_class_means(
    rule: str, tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    block = lifelong(tiny_model_folder, tasks[:2], folder, task_rule=rule).run()["class_incremental"]
    assert block["rule"] == rule and 0 < block["adapters"]["task_found"] <= 1
    entries = read_json(folder / "adapter" / "adapter_config.json")["tasks"]
    maps = ["features", "relu-2000-0"] if rule == "ranpac" else ["features"]
    assert [entry["statistics"]["feature_maps"] for entry in entries] == [maps] * 2
    if rule == "ranpac":
        with pytest.raises(ValueError, match="feature_map: was 'relu-2000-0', now 'relu-7-0'"):
            lifelong(tiny_model_folder, tasks[:2], folder, task_rule=RanPAC(size=7)).run()


def test_without_kept_features_nothing_is_calibrated_or_unknown(
    tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    trainer = lifelong(tiny_model_folder, tasks[:2], folder, keep_validation_features=False)
    block = trainer.run()["class_incremental"]
    assert block["calibration"]["temperature"] == 1
    unknown = block["unknown"]
    assert unknown["threshold"] is unknown["false_alarms"] is unknown["mean_detected"] is None
    assert len(unknown["auroc"]) == 2
    model = QTuningModel.from_pretrained(load_base_model(str(tiny_model_folder))[0], folder / "adapter")
    assert all(len(each.validation_features) == 0 for each in model.statistics.values())


def test_tasks_without_classes_count_as_one_class(tmp_path: Path, tiny_model_folder: Path, tasks: list[Task]) -> None:
    splits = {split: getattr(tasks[0], split) for split in SPLITS}
    several = dataclasses.replace(
        tasks[0],
        name="several",
        problem_type=MULTI,
        **{split: Examples(part.inputs, [(1 - y, y) for y in part.labels]) for split, part in splits.items()},
    )
    block = lifelong(tiny_model_folder, [several, tasks[1]], tmp_path / "run").run()["class_incremental"]
    assert block["classes"] == [1, 3]
    found, right = block["adapters"]["task_found_matrix"][-1], block["adapters"]["accuracy_matrix"][-1]
    assert right[0] == found[0] == block["confusion"][0][0]
    with pytest.raises(ValueError, match="rule 'most-confident' compares probabilities of classes, but task 'several'"):
        lifelong(tiny_model_folder, [several, tasks[1]], tmp_path / "other", task_rule="most-confident")
    assert not (tmp_path / "other").exists()


def test_a_wrong_rule_and_a_reserved_name_fail_before_any_work(
    tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="rule is 'nearest'; it must be one of closed-form"):
        lifelong(tiny_model_folder, tasks, tmp_path / "run", task_rule="nearest")
    with pytest.raises(ValueError, match="name is 'infer', which is no task name"):
        lifelong(tiny_model_folder, [dataclasses.replace(tasks[0], name="infer")], tmp_path / "run")
    assert not (tmp_path / "run").exists()
