"""The head over all classes of a run: recomputed from the run's files, resumed, and refused where it has no sense."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from qtuning_fast import LifelongTrainer, QTuningConfig, QTuningModel
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.data.encoding import ExampleEncoder
from qtuning_fast.lifelong.data.loading import load_task
from qtuning_fast.lifelong.joint_head import FILE, check_joint_head, nearest_centroids
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.report.console import run_tables
from qtuning_fast.lifelong.report.page import write_report
from qtuning_fast.lifelong.task_trainer import TaskTrainer
from qtuning_fast.lifelong.tasks import Examples, Task
from qtuning_fast.method.class_gaussians import ClassGaussians
from qtuning_fast.method.closed_form import LinearHead
from qtuning_fast.method.task_adaptive import Rebalancing, rebalanced
from qtuning_fast.method.task_rule import Evidence
from qtuning_fast.model.checked_files import read_json, read_tensors

METHOD = QTuningConfig(prompt_length=2, shared_length=0, queue_size=1, retention_weight=0.0)
TRAINING = TrainingOptions(
    steps=4,
    batch_size=4,
    max_length=10,
    eval_every=2,
    prompt_rate=0.03,
    joint_head="covariance",
    joint_epochs=3,
    joint_rate=0.05,
    contrast=0.1,
)


@pytest.fixture(scope="module")
def tasks(toy_files: dict[str, Path]) -> list[Task]:
    return [
        load_task(f"{name}={toy_files[name]}", shots=6, validation_shots=4, test_size=8)
        for name in ("colours", "animals", "warm")
    ]


def lifelong(model: Path, tasks: list[Task], folder: Path, training: TrainingOptions = TRAINING) -> LifelongTrainer:
    return LifelongTrainer(*load_base_model(str(model)), METHOD, tasks, training, folder)


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tasks: list[Task], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint") / "run"
    lifelong(tiny_model_folder, tasks, folder).run()
    return folder


def part(run: Path, number: int, name: str) -> Path:
    [folder] = (run / "tasks").glob(f"{number:02d}-*")
    return folder / name


def tensors(run: Path, number: int, name: str) -> dict[str, torch.Tensor]:
    index = part(run, number, FILE)
    return read_tensors(index.parent, read_json(index)[name])


def test_it_is_the_definition(run: Path, tiny_model_folder: Path, tasks: list[Task]) -> None:
    base, tokenizer = load_base_model(str(tiny_model_folder))
    model = QTuningModel.from_pretrained(base, run / "adapter").eval()
    encoder = ExampleEncoder(tokenizer, METHOD.task_type, TRAINING.max_length)
    trainer = lifelong(tiny_model_folder, tasks, run)
    seeds = [trainer._task_seed(number) for number in range(3)]
    sizes = [len(task.label_names) for task in tasks]
    weight, bias = torch.zeros(0), torch.zeros(0)
    for number, task in enumerate(tasks):
        train = encoder.encode(task.train)
        [batch] = train.batches(len(train), model.device)
        x = model.features(batch, task=task.name)
        expected = ClassGaussians.of(x, train.columns["labels"])
        saved = tensors(run, number, "gaussians")
        assert torch.allclose(saved["means"], expected.means, atol=1e-5)
        adapter = model.adapters[task.name]
        head = LinearHead(adapter.head_weight.double(), adapter.head_bias.double())
        if number:
            head = LinearHead(torch.cat([weight, head.weight]), torch.cat([bias, head.bias]))
            own = [ClassGaussians.from_tensors(tensors(run, n, "gaussians")) for n in range(number + 1)]
            joined = ClassGaussians.joined(own, [sum(sizes[:n]) for n in range(number + 1)])
            head = rebalanced(head, joined, Rebalancing(3, 0.05, 20), seed=seeds[number])
        weight, bias = head.weight, head.bias
        saved = tensors(run, number, "head")
        assert torch.equal(saved["weight"], weight) and torch.equal(saved["bias"], bias)
        joint = read_json(part(run, number, "class_incremental.json"))["joint_head"]
        classes = [(place, label) for place in range(number + 1) for label in range(sizes[place])]
        for place, asked in enumerate(tasks[: number + 1]):
            answers = []
            for example in encoder.encode(asked.test).batches(1, model.device):
                rule = model.fit_task_rule([each.name for each in tasks[: number + 1]], "closed-form")
                inferred = rule.infer(Evidence(model.features(example, task=None), dict)).task_names[0]
                answers.append(classes[int(head(model.features(example, task=inferred)).argmax())])
            truth = [(place, label) for label in asked.test.labels]
            assert joint["accuracy"][place] == np.mean([a == t for a, t in zip(answers, truth)])
            assert joint["task_found"][place] == np.mean([a[0] == place for a in answers])
    model.detach()


def test_an_interrupted_run_ends_the_same(
    run: Path, tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for number in (1, 2):
        for name in ("class_incremental.json", FILE):
            part(again, number, name).unlink()
    (again / "metrics.json").unlink()
    found, before = lifelong(tiny_model_folder, tasks, again).run(), read_json(run / "metrics.json")
    assert found["class_incremental"] == before["class_incremental"]


def test_a_task_alone_knows_of_no_other(
    tiny_model_folder: Path, tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []
    real = TaskTrainer.__init__

    def noted(self: Any, model: Any, *arguments: Any, earlier_means: Any = None, **more: Any) -> None:
        given.append((len(model.tasks), len(earlier_means)))
        real(self, model, *arguments, earlier_means=earlier_means, **more)

    monkeypatch.setattr(TaskTrainer, "__init__", noted)
    base = load_base_model(str(tiny_model_folder))
    LifelongTrainer(*base, METHOD, tasks[:2], TRAINING, tmp_path / "run", forward_transfer=True).run()
    assert given == [(0, 0), (1, len(tasks[0].label_names)), (0, 0)]


def test_it_is_shown(run: Path, tmp_path: Path) -> None:
    metrics = read_json(run / "metrics.json")
    block = metrics["class_incremental"]["joint_head"]
    assert 0 <= block["average_accuracy"] <= 1 and len(block["accuracy_matrix"]) == 3
    assert block["task_found"] > 0
    page = write_report(metrics, tmp_path).read_text()
    assert "<dt>joint head</dt>" in page and "<th>joint head</th>" in page
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    console.print(run_tables(metrics))
    assert "joint head" in console.export_text()


def test_centroids_are_those_of_k_means() -> None:
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = torch.cat([(middles[:, None] + torch.tensor([[0.1, 0.0], [-0.1, 0.0]])).flatten(0, 1)] * 4)
    found = nearest_centroids(x, seed=0)
    assert len(found.unique()) == 6  # as many as there are different examples
    assert all(len(x[found == each].unique(dim=0)) == 1 for each in found.unique())
    many = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    assert len(nearest_centroids(many, 1).unique()) == 10
    assert torch.equal(nearest_centroids(many, 1), nearest_centroids(many, 1))


@pytest.mark.parametrize("setting", [{"joint_head": "variance"}, {"contrast": 0.1}])
def test_where_it_has_no_sense(setting: dict[str, Any], tasks: list[Task]) -> None:
    [name] = setting
    training = TrainingOptions(**setting)
    with pytest.raises(ValueError, match=rf"{name} is .*, but task_type='causal-lm' has no heads"):
        check_joint_head(QTuningConfig(task_type="causal-lm"), training, tasks)
    numbers = Examples(["a"], [0.5])
    regression = Task("mood", ["number"], numbers, numbers, numbers, "made up", problem_type="regression")
    with pytest.raises(ValueError, match=rf"{name} is .* task 'mood' has problem_type='regression'"):
        check_joint_head(METHOD, training, [*tasks, regression])
    check_joint_head(METHOD, TrainingOptions(), [regression])


def test_without_it_there_are_no_files(tiny_model_folder: Path, tasks: list[Task], tmp_path: Path) -> None:
    training = TrainingOptions(steps=2, batch_size=4, max_length=10, eval_every=2)
    metrics = lifelong(tiny_model_folder, tasks[:1], tmp_path / "run", training).run()
    assert "joint_head" not in metrics["class_incremental"]
    assert not [*tmp_path.rglob("*gaussians*"), *tmp_path.rglob(FILE)]
