"""LifelongTrainer on toy tasks: what it reports, that it repeats itself, and that it goes on where it was cut off."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from qtuning_fast import LifelongTrainer, QTuningConfig, QTuningModel
from qtuning_fast.lifelong.base_models import load_base_model
from qtuning_fast.lifelong.data.loading import load_task
from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.lifelong.task_trainer import latest_checkpoint
from qtuning_fast.lifelong.tasks import Examples, Task, few_shot_split
from qtuning_fast.method.labels import MULTI, REGRESSION, SINGLE
from qtuning_fast.model.checked_files import read_json, write_json

METHOD = QTuningConfig(prompt_length=2, shared_length=2, queue_size=3)
TRAINING = TrainingOptions(steps=6, batch_size=4, max_length=10, eval_every=2, prompt_rate=0.03, head_rate=0.03)
TIMES = {"seconds", "start_seconds", "step_seconds"}


class CutOff(BaseException):
    """Stands for whatever ends a process."""


class CutOffAt(TrainerCallback, RunListener):
    """Ends the run at one of its events, counted over the whole run."""

    def __init__(self, event: int) -> None:
        self.left = event

    def _tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise CutOff

    def task_begins(self, *_: Any) -> None:
        self._tick()

    def task_ends(self, *_: Any) -> None:
        self._tick()

    def step_callback(self, steps: int) -> TrainerCallback:
        return self

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._tick()

    def on_save(self, *_: Any, **__: Any) -> None:
        self._tick()


@pytest.fixture(scope="module")
def tasks(toy_files: dict[str, Path]) -> list[Task]:
    return [load_task(f"{name}={path}", shots=4, validation_shots=3, test_size=12) for name, path in toy_files.items()]


def lifelong(model: Path, tasks: list[Task], folder: Path, **changes: Any) -> LifelongTrainer:
    arguments: dict[str, Any] = {"config": METHOD, "options": TRAINING} | changes
    return LifelongTrainer(*load_base_model(str(model)), tasks=tasks, folder=folder, **arguments)


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return metrics | {"per_task": [{k: v for k, v in task.items() if k not in TIMES} for task in metrics["per_task"]]}


@pytest.fixture(scope="module")
def undisturbed(tiny_model_folder: Path, tasks: list[Task], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return lifelong(tiny_model_folder, tasks, tmp_path_factory.mktemp("undisturbed") / "run").run()


def test_metrics_hold_what_they_must(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["tasks"] == ["colours", "animals", "warm", "pets"]
    for task, name in zip(undisturbed["per_task"], undisturbed["tasks"]):
        assert task["name"] == name and task["steps"] == 6 and task["seconds"] > task["step_seconds"] > 0
    assert [task["prefix_rows"] for task in undisturbed["per_task"]] == [4, 6, 8, 8]
    evictions = [task["energy_kept"] is not None for task in undisturbed["per_task"]]
    assert evictions == [False, False, False, True]
    assert [bool(task["retention_curve"]) for task in undisturbed["per_task"]] == evictions
    for evaluation in ("task_adapter", "live_queue"):
        summary = undisturbed[evaluation]
        assert [sum(value is not None for value in row) for row in summary["accuracy_matrix"]] == [1, 2, 3, 4]
        assert summary["forward_transfer"] is None
    assert undisturbed["task_adapter"]["forgetting"] == 0
    probe = undisturbed["baselines"]["linear_probe"]
    assert probe["average_accuracy"] == pytest.approx(sum(probe["accuracy"]) / 4)
    assert {"config", "versions", "device"} <= undisturbed.keys()
    json.dumps(undisturbed, allow_nan=False)


def test_a_just_finished_task_answers_alike_in_both_evaluations(undisturbed: dict[str, Any]) -> None:
    for number in range(4):
        stored, live = (undisturbed[kind]["accuracy_matrix"][number][number] for kind in ("task_adapter", "live_queue"))
        assert stored == live


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    undisturbed: dict[str, Any], tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    assert without_times(lifelong(tiny_model_folder, tasks, tmp_path / "a").run()) == without_times(undisturbed)
    other = lifelong(
        tiny_model_folder, tasks, tmp_path / "b", options=TrainingOptions(**{**TRAINING.to_dict(), "seed": 1})
    )
    assert other.run()["per_task"][0]["loss_curve"] != undisturbed["per_task"][0]["loss_curve"]


# A run has 4 beginnings, 4 ends, 24 steps and 12 saves.
@pytest.mark.parametrize(
    "event", [17, *(pytest.param(n, marks=pytest.mark.thorough) for n in (0, 3, 8, 30, 36, 40, 43))]
)
def test_cut_off_anywhere_it_goes_on_to_the_same_end(
    event: int, undisturbed: dict[str, Any], tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    with pytest.raises(CutOff):
        lifelong(tiny_model_folder, tasks, tmp_path / "run", listener=CutOffAt(event)).run()
    assert without_times(lifelong(tiny_model_folder, tasks, tmp_path / "run").run()) == without_times(undisturbed)


def test_a_head_is_mixed_after_training(tiny_model_folder: Path, tasks: list[Task], tmp_path: Path) -> None:
    curves, digests = [], []
    for head_end in ("mixed", "trained"):
        options = TrainingOptions(**{**TRAINING.to_dict(), "head_end": head_end})
        metrics = lifelong(tiny_model_folder, tasks[:1], tmp_path / head_end, options=options).run()
        curves.append(metrics["per_task"][0]["validation_curve"])
        (evaluation,) = (tmp_path / head_end).rglob("evaluation.json")
        digests.append(json.loads(evaluation.read_text())["adapter_digest"])
    assert curves[0] == curves[1] and digests[0] != digests[1]  # training is the same, the head is another


def test_checkpoints_are_read_without_unpickling(
    tiny_model_folder: Path, tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CutOff):
        lifelong(tiny_model_folder, tasks, tmp_path / "run", listener=CutOffAt(7)).run()
    reads = []
    load = torch.load

    def watched(*arguments: Any, **options: Any) -> Any:
        reads.append(options.get("weights_only"))
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", watched)
    lifelong(tiny_model_folder, tasks, tmp_path / "run").run()
    assert len(reads) >= 3 and all(reads)  # optimizer, scheduler, random state


@pytest.mark.thorough
def test_cut_off_again_and_again_and_moved_it_still_ends_the_same(
    undisturbed: dict[str, Any], tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    folder = tmp_path / "run-0"
    for attempt in range(1, 50):
        try:
            metrics = lifelong(tiny_model_folder, tasks, folder, listener=CutOffAt(12)).run()
            break
        except CutOff:
            folder = shutil.move(folder, tmp_path / f"run-{attempt}")
    assert attempt > 2
    assert without_times(metrics) == without_times(undisturbed)


def test_early_stopping_ends_the_same_when_it_is_cut_off_after_the_stop(
    tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    stopping = TrainingOptions(**{**TRAINING.to_dict(), "steps": 40, "patience": 1})
    expected = lifelong(tiny_model_folder, tasks[:1], tmp_path / "a", options=stopping).run()
    steps = expected["per_task"][0]["steps"]
    assert steps < 40 and expected["per_task"][0]["best_step"] < steps
    saves = steps // 2
    listener = CutOffAt(1 + steps + saves - 1)  # at the very last save
    with pytest.raises(CutOff):
        lifelong(tiny_model_folder, tasks[:1], tmp_path / "b", options=stopping, listener=listener).run()
    again = lifelong(tiny_model_folder, tasks[:1], tmp_path / "b", options=stopping).run()
    assert without_times(again) == without_times(expected)


@pytest.mark.parametrize("event", [8, *(pytest.param(n, marks=pytest.mark.thorough) for n in (36, 1000))])
def test_after_a_run_or_a_cut_the_base_model_is_what_it_was(
    event: int, tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    base, tokenizer = load_base_model(str(tiny_model_folder))
    inputs = tokenizer(["the red cat"], return_tensors="pt")
    expected = base(**inputs).last_hidden_state
    arguments = {"config": METHOD, "options": TRAINING, "folder": tmp_path / "run"}
    with contextlib.suppress(CutOff):
        LifelongTrainer(base, tokenizer, tasks=tasks, listener=CutOffAt(event), **arguments).run()
    assert torch.equal(base(**inputs).last_hidden_state, expected)
    assert all(p.requires_grad for p in base.parameters()) and base.config._attn_implementation == "sdpa"
    LifelongTrainer(base, tokenizer, tasks=tasks, **arguments).run()  # and the same base goes on


@pytest.mark.parametrize(
    ("which", "file"),
    [("latest", "optimizer.pt"), pytest.param("best", "model.safetensors", marks=pytest.mark.thorough)],
)
def test_a_checkpoint_that_is_not_whole_is_never_used(
    which: str, file: str, undisturbed: dict[str, Any], tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    with pytest.raises(CutOff):  # in the first task after the saves at steps 2 and 4
        lifelong(tiny_model_folder, tasks, tmp_path / "run", listener=CutOffAt(8)).run()
    checkpoints = next((tmp_path / "run" / "tasks").glob("00-*")) / "checkpoints"
    chosen = Path(latest_checkpoint(checkpoints) or "")
    if which == "best":
        best = json.loads((chosen / "trainer_state.json").read_text())["best_global_step"]
        chosen = checkpoints / f"checkpoint-{best}"
    content = bytearray((chosen / file).read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 4
    (chosen / file).write_bytes(content)
    assert without_times(lifelong(tiny_model_folder, tasks, tmp_path / "run").run()) == without_times(undisturbed)


def test_with_a_look_at_the_last_step_only_it_ends_the_same(
    tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    never = TrainingOptions(**{**TRAINING.to_dict(), "eval_every": 7})
    expected = lifelong(tiny_model_folder, tasks[:1], tmp_path / "a", options=never).run()
    assert expected["per_task"][0]["best_step"] == 6  # the last step is always looked at
    with pytest.raises(CutOff):  # at the one save, after the last step
        lifelong(tiny_model_folder, tasks[:1], tmp_path / "b", options=never, listener=CutOffAt(7)).run()
    again = lifelong(tiny_model_folder, tasks[:1], tmp_path / "b", options=never).run()
    assert without_times(again) == without_times(expected)


def test_a_run_killed_in_its_first_instant_can_begin_again(
    tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for name in (".lock", ".run.json.123.part"):
        (tmp_path / "run" / name).touch()
    assert lifelong(tiny_model_folder, tasks[:1], tmp_path / "run").run()["tasks"] == ["colours"]


def test_forward_transfer_compares_with_each_task_learned_alone(
    undisturbed: dict[str, Any], tiny_model_folder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    metrics = lifelong(tiny_model_folder, tasks[:3], tmp_path / "run", forward_transfer=True).run()
    learned = [metrics["task_adapter"]["accuracy_matrix"][number][number] for number in range(3)]
    assert learned == [undisturbed["task_adapter"]["accuracy_matrix"][n][n] for n in range(3)]  # asking changes nothing
    gains = []
    for number in (1, 2):
        stage = next((tmp_path / "run" / "tasks").glob(f"{number:02d}-*")) / "alone.json"
        gains.append(learned[number] - json.loads(stage.read_text())["accuracy"])
    assert metrics["task_adapter"]["forward_transfer"] == pytest.approx(sum(gains) / 2)
    again = lifelong(tiny_model_folder, tasks[:3], tmp_path / "run", forward_transfer=True).run()
    assert without_times(again) == without_times(metrics)


def test_an_adapter_that_changed_is_noticed(tiny_model_folder: Path, tasks: list[Task], tmp_path: Path) -> None:
    lifelong(tiny_model_folder, tasks[:2], tmp_path / "run").run()
    path = next((tmp_path / "run" / "tasks").glob("00-*")) / "evaluation.json"
    write_json(path, read_json(path) | {"adapter_digest": "another"})
    with pytest.raises(RuntimeError, match="adapter of 'colours'"):
        lifelong(tiny_model_folder, tasks[:2], tmp_path / "run").run()


def test_an_empty_split_is_refused_by_name(tiny_model_folder: Path, tasks: list[Task], tmp_path: Path) -> None:
    without = [dataclasses.replace(tasks[0], validation=Examples([], []))]
    with pytest.raises(ValueError, match="'colours' has no validation examples"):
        lifelong(tiny_model_folder, without, tmp_path / "run")


def test_another_run_in_the_same_folder_is_refused(tiny_model_folder: Path, tasks: list[Task], tmp_path: Path) -> None:
    lifelong(tiny_model_folder, tasks[:1], tmp_path / "run").run()
    other = TrainingOptions(**{**TRAINING.to_dict(), "steps": 7})
    with pytest.raises(ValueError, match=r"another run.*steps was 6, now 7"):
        lifelong(tiny_model_folder, tasks[:1], tmp_path / "run", options=other).run()
    with pytest.raises(ValueError, match=r"another run.*tasks"):
        lifelong(tiny_model_folder, tasks[1:2], tmp_path / "run").run()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        lifelong(tiny_model_folder, tasks[:1], tmp_path / "mine").run()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="no name twice"):
        lifelong(tiny_model_folder, tasks[:1] * 2, tmp_path / "new")
    recorded = read_json(tmp_path / "run" / "run.json")
    del recorded["training"]["head_end"]  # as before heads could be mixed
    write_json(tmp_path / "run" / "run.json", recorded)
    with pytest.raises(ValueError, match=r"another run.*head_end was 'trained', now 'mixed'"):
        lifelong(tiny_model_folder, tasks[:1], tmp_path / "run").run()


# Several labels a text, and numbers


def of_another_kind(name: str, problem_type: str) -> Task:
    """Which colours a text names, or how many animals."""
    draw = random.Random(name)
    animals, colours, others = ["cat", "dog", "horse"], ["red", "green", "blue"], ["the", "a", "is", "seen", "old"]
    inputs: dict[str, Any] = {}
    while len(inputs) < 200:
        words = animals if problem_type == REGRESSION else colours
        chosen = draw.sample(words, draw.randrange(4))
        text = [*chosen, *draw.choices(others, k=6 - len(chosen))]
        draw.shuffle(text)
        inputs[" ".join(text)] = len(chosen) if problem_type == REGRESSION else chosen
    sizes = {"shots": 100, "validation_shots": 40, "test_size": 60, "seed": 0}
    names = ["animals"] if problem_type == REGRESSION else None
    return few_shot_split(
        [*inputs], [*inputs.values()], name=name, **sizes, label_names=names, problem_type=problem_type
    )


def test_a_stream_mixes_kinds_of_labels(tiny_model_folder: Path, tasks: list[Task], tmp_path: Path) -> None:
    kinds = {"colours named": MULTI, "count": REGRESSION}
    stream = [tasks[0], *(of_another_kind(name, kind) for name, kind in kinds.items())]
    options = dataclasses.replace(TRAINING, steps=120, batch_size=16, eval_every=20)
    run = lifelong(tiny_model_folder, stream, tmp_path / "run", options=options, forward_transfer=True)
    metrics = run.run()
    assert [task["metric"] for task in metrics["per_task"]] == ["accuracy", "micro_f1", "pearson"]
    assert [task["problem_type"] for task in metrics["per_task"]] == [SINGLE, MULTI, REGRESSION]
    final = metrics["task_adapter"]["accuracy_matrix"][-1]
    assert min(final[1:]) > 0.5, final
    assert all(task["validation_curve"] for task in metrics["per_task"])
    probe = read_json(tmp_path / "run" / "tasks" / "01-colours_named" / "probe.json")
    assert metrics["baselines"]["linear_probe"]["accuracy"][1] == probe["micro_f1"] > 0.5
    assert metrics["task_adapter"]["forward_transfer"] is not None
    model = QTuningModel.from_pretrained(run.base_model, tmp_path / "run" / "adapter")
    assert [model.problem_type(name) for name in model.tasks] == [SINGLE, MULTI, REGRESSION]


def test_a_language_model_refuses_labels_that_are_no_words(
    tiny_model_folder: Path, folders_of_models: dict[str, Path], tmp_path: Path
) -> None:
    base, processor = load_base_model(str(folders_of_models["text-to-text"]), "text-to-text")
    config = dataclasses.replace(METHOD, task_type="text-to-text")
    with pytest.raises(ValueError, match=r"'count' has problem_type='regression'.*use task_type='sequence-class"):
        LifelongTrainer(base, processor, config, [of_another_kind("count", REGRESSION)], TRAINING, tmp_path / "run")
