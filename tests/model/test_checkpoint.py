"""Checkpoints on disk: a save is whole or refused, and this version reads what the version before wrote."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.method.labels import MULTI, SINGLE
from qtuning_fast.method.task_rule import TaskRule
from qtuning_fast.method.task_rules import RanPAC
from qtuning_fast.model.checked_files import CorruptFileError, read_json, write_json
from qtuning_fast.model.checkpoint import CONFIG_FILE, FORMAT_VERSION, READABLE_VERSIONS, read_checkpoint

FORMAT_3 = Path(__file__).parent / "format-3"  # three tasks, the third after an eviction, written by that version
WITHIN_A_TASK = FORMAT_3 / "within-a-task.safetensors"  # of a fourth task, by the same version
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])

Batch = dict[str, torch.Tensor]


def small_config() -> QTuningConfig:
    return QTuningConfig(prompt_length=3, queue_size=3, shared_length=2)


@pytest.fixture
def base() -> BertModel:
    """The base model of `format-3`. Its weights are exact in every precision."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(**sizes, vocab_size=11, max_position_embeddings=16))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            parameter.copy_((steps * (number + 2) % 11 - 5) / 16)
    return model.eval()


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FORMAT_3, tmp_path / "older"))


@torch.no_grad()
def logits(model: QTuningModel, task: str, *, live: bool = False) -> torch.Tensor:
    model.set_task(task, live=live)
    return model.eval()(input_ids=IDS).logits


def check(model: QTuningModel, expected: dict[str, torch.Tensor]) -> None:
    for task in ("first", "second", "third"):
        torch.testing.assert_close(logits(model, task), expected[task])
        torch.testing.assert_close(logits(model, task, live=True), expected[f"{task}.live"])
    for name, state in model.training_prefix.queue.state_dict().items():
        assert torch.equal(state, expected[f"queue.{name}"])


def test_a_checkpoint_of_the_format_before_computes_the_same(base: BertModel, older: Path, tmp_path: Path) -> None:
    assert read_json(older / CONFIG_FILE)["format_version"] == 3 == FORMAT_VERSION - 1
    expected = load_file(older / "expected.safetensors")
    model = QTuningModel.from_pretrained(base, older)
    check(model, expected)
    model.set_task(None)
    model.save_pretrained(tmp_path / "newer")
    assert read_json(tmp_path / "newer" / CONFIG_FILE)["format_version"] == FORMAT_VERSION
    model = QTuningModel.from_pretrained(model.detach(), tmp_path / "newer", lazy=True)
    check(model, expected)


def test_a_run_goes_on_from_the_format_before(base: BertModel, older: Path) -> None:
    model = QTuningModel.from_pretrained(base, older)
    model.start_task("fourth", 2)
    model.train()
    assert model(input_ids=IDS, labels=torch.tensor([0, 1])).retention_loss is not None  # held against the third
    model.finish_task()
    assert model.tasks == ["first", "second", "third", "fourth"]


def test_a_task_goes_on_from_a_checkpoint_within_it_of_the_format_before(base: BertModel, older: Path) -> None:
    state = load_file(WITHIN_A_TASK)
    logits, loss = state.pop("expected.logits"), state.pop("expected.loss")
    assert any(name.startswith("live.") for name in state)
    model = QTuningModel.from_pretrained(base, older)
    model.start_task("fourth", 2)
    model.load_trainable_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, logits)
    torch.manual_seed(6)  # the shift of memory retention
    output = model.train()(input_ids=IDS, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(output.loss.detach(), loss)
    assert output.retention_loss is not None
    resumed = model.trainable_state_dict()
    assert resumed.keys() == {"_extra_state", *(name.replace("live.", "prefix.") for name in state)}
    assert all(torch.equal(resumed[name.replace("live.", "prefix.")], x) for name, x in state.items())


def test_a_checkpoint_within_another_task_is_refused(base: BertModel, older: Path) -> None:
    state = {name: x for name, x in load_file(WITHIN_A_TASK).items() if not name.startswith("expected.")}
    model = QTuningModel.from_pretrained(base, older)
    model.start_task("fourth", 2)
    with pytest.raises(ValueError, match=r"does not fit the task in training: missing \['head\.bias'\]"):
        model.load_trainable_state_dict({name: x for name, x in state.items() if name != "head.bias"})
    with pytest.raises(ValueError, match=r"unexpected \['expected\.loss'\]"):
        model.load_trainable_state_dict(state | {"expected.loss": torch.zeros(())})


@pytest.mark.parametrize("version", [None, 2, FORMAT_VERSION + 1, "4"])
def test_other_formats_are_refused(older: Path, version: object) -> None:
    content = read_json(older / CONFIG_FILE)
    write_json(older / CONFIG_FILE, content | {"format_version": version})
    with pytest.raises(ValueError, match=f"format version {version}; this version of qtuning_fast reads 3 and 4"):
        read_checkpoint(older)
    assert READABLE_VERSIONS == (3, FORMAT_VERSION)


def test_the_index_is_written_last_and_names_every_file(base: BertModel, tmp_path: Path) -> None:
    model = QTuningModel(base, QTuningConfig(prompt_length=2, shared_length=1, reparameterization=None))
    model.start_task("only", 2)
    model.finish_task()
    model.save_pretrained(tmp_path)
    index = json.loads((tmp_path / CONFIG_FILE).read_text())
    named = {index["state"]["file"], *(task["file"] for task in index["tasks"])}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == named
    (tmp_path / index["state"]["file"]).unlink()
    with pytest.raises(CorruptFileError, match="is missing"):
        read_checkpoint(tmp_path)


def test_a_save_replaces_the_one_before_and_leaves_nothing_behind(
    tiny_bert: BertModel, batch: Batch, tmp_path: Any, learn: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config())
    for tasks in (1, 2, 3):
        learn(model, batch, 1)
        model.save_pretrained(tmp_path)
        assert len([path for path in tmp_path.iterdir() if path.name != ".lock"]) == tasks + 2  # tasks, state, index


def test_a_save_leaves_what_belongs_to_others_alone(
    tiny_bert: BertModel, batch: Batch, tmp_path: Any, learn: Any
) -> None:
    tiny_bert.save_pretrained(tmp_path)
    model = QTuningModel(tiny_bert, small_config())
    for _ in range(2):
        learn(model, batch, 1)
        model.save_pretrained(tmp_path)
    assert {"model.safetensors", "config.json"} <= {path.name for path in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_saves_at_once_leave_a_whole_one(tiny_bert: BertModel, batch: Batch, tmp_path: Any, learn: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 2)
    saved = []
    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(model.save_pretrained, tmp_path) for _ in range(20)]:
            saved.append(done.result())
    assert len(saved) == 20 and list(read_checkpoint(tmp_path).adapters) == ["task-0", "task-1"]


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"config": {"rank": 3}},
        {"base_model": "x"},
        {"tasks": None},
        {"tasks": ["x"]},
        {"tasks": [{"name": 5, "label_names": ["a", "b"]}]},
        {"state": {"file": 3, "sha256": ""}},
        {"state": {"file": "../state", "sha256": ""}},
        {"format_version": 1},
        {"config": {"colour": "red"}},
    ],
)
def test_an_index_that_was_tampered_with_is_refused(
    tiny_bert: BertModel, batch: Batch, tmp_path: Any, change: dict, learn: Any
) -> None:
    model = QTuningModel(tiny_bert, small_config())
    learn(model, batch, 2)
    model.save_pretrained(tmp_path)
    index = read_json(tmp_path / "adapter_config.json")
    write_json(tmp_path / "adapter_config.json", index | change)
    base = model.detach()
    with pytest.raises(ValueError, match=r"adapter_config|does not fit|damaged|missing|index|colour"):
        QTuningModel.from_pretrained(base, tmp_path)
    assert all(parameter.requires_grad for parameter in base.parameters())
    QTuningModel(base, small_config())


def test_saving_amid_a_task_is_refused(tiny_bert: BertModel, tmp_path: Any) -> None:
    model = QTuningModel(tiny_bert, small_config())
    model.start_task("task", 2)
    with pytest.raises(RuntimeError, match="'task' is in training"):
        model.save_pretrained(tmp_path)


def test_a_state_dict_of_the_format_before_loads_into_the_model(base: BertModel, older: Path) -> None:
    model = QTuningModel.from_pretrained(base, older)
    model.start_task("fourth", 2)  # now there is a head and a discriminator
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = {
        re.sub(r"^learning\.(prefix\.)?", lambda m: "live." if m[1] else "", name): x for name, x in state.items()
    }
    del before["_extra_state"]  # it names the task, as no state did then
    before |= {f"base_model.{name}": x for name, x in model.base_model.state_dict().items()}
    assert {name.partition(".")[0] for name in before} == {"base_model", "live", "discriminator", "head"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: value for name, value in before.items() if not name.startswith("live.")})


def test_the_index_names_a_problem_type_only_where_it_is_not_the_usual_one(tiny_bert: BertModel, tmp_path: Any) -> None:
    """So a checkpoint with the usual one has what it had before there were others, and an older one can be read."""
    model = QTuningModel(tiny_bert, small_config())
    for name, problem_type in (("moods", SINGLE), ("topics", MULTI)):
        model.start_task(name, 2, problem_type=problem_type)
        model.finish_task()
    model.save_pretrained(tmp_path)
    index = read_json(tmp_path / CONFIG_FILE)
    assert [entry.get("problem_type") for entry in index["tasks"]] == [None, MULTI]
    adapters = read_checkpoint(tmp_path).adapters
    assert [adapters.entry(name).info.problem_type for name in adapters] == [SINGLE, MULTI]
    index["tasks"][1]["problem_type"] = "ranking"
    write_json(tmp_path / CONFIG_FILE, index)
    with pytest.raises(CorruptFileError, match="'topics' has an unknown problem type, 'ranking'"):
        read_checkpoint(tmp_path)


# Statistics of tasks


def known(model: QTuningModel) -> dict[str, torch.Tensor]:
    """All statistics by task and name."""
    return {f"{task}.{name}": x for task, each in model.statistics.items() for name, x in each.tensors().items()}


def changed(folder: Path, name: str, **changes: Any) -> None:
    """Rewrite what the index says of one task's statistics."""
    index = read_json(folder / CONFIG_FILE)
    for entry in index["tasks"]:
        if entry["name"] == name:
            entry["statistics"] |= changes
    write_json(folder / CONFIG_FILE, index)


@pytest.mark.parametrize("lazy", [False, True])
def test_statistics_are_saved_and_read_with_their_tasks(
    tmp_path: Path, families: Any, recognising: Any, inputs_of: Any, lazy: bool
) -> None:
    family = families["BERT"]
    model, batch = recognising(family, 3), inputs_of(family, 1, seed=3)
    expected, before = known(model), model.infer_tasks(**batch)
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("statistics-*.safetensors"))) == 3
    model = QTuningModel.from_pretrained(model.detach(), tmp_path, lazy=lazy)
    assert model.statistics.bytes_in_memory == (0 if lazy else sum(x.nbytes for x in expected.values()))
    after = model.infer_tasks(**batch)
    assert torch.equal(after.class_probabilities, before.class_probabilities) and after.threshold == before.threshold
    assert all(torch.equal(x, expected[name]) for name, x in known(model).items())
    other = recognising(family, 1)  # and one of them goes to another model
    other.load_task(tmp_path, "task-2")
    found = other.infer_tasks(**batch)
    assert found.tasks == ("task-0", "task-2") and found.left_out == ()
    assert all(torch.equal(x, expected[name]) for name, x in known(other).items() if name.startswith("task-2"))


def test_a_save_over_another_keeps_the_statistics_there_are(
    tmp_path: Path, families: Any, recognising: Any, inputs_of: Any
) -> None:
    family = families["BERT"]
    model = recognising(family, 3)
    model.save_pretrained(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*-*.safetensors")}
    model.remove_task("task-0")
    model.record_statistics("task-1", [inputs_of(family, 2) | {"labels": torch.arange(6) % 3}])
    model.save_pretrained(tmp_path)
    assert read_checkpoint(tmp_path).statistics["task-1"].features.counts.tolist() == [2, 2, 2]
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*-*.safetensors")}
    assert sorted(name.partition("-")[0] for name in after) == ["state", *["statistics"] * 2, *["task"] * 2]
    untouched = {name.rpartition("-")[0] for name, _ in after.items() & before.items()}
    assert untouched == {"task-001", "task-002", "statistics-002"}
    model.adapters.remove("task-1")  # behind the model's back: statistics of no task are not saved
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("statistics-*"))) == 1
    model = QTuningModel.from_pretrained(model.detach(), tmp_path)
    assert list(model.statistics) == ["task-2"] and model.infer_tasks(**inputs_of(family, 1)).tasks == ("task-2",)


def test_of_a_save_without_statistics_they_are_recorded_later(
    base: BertModel, older: Path, tmp_path: Path, families: Any, recognising: Any, inputs_of: Any
) -> None:
    """As version 0.1 wrote it: its index says nothing of statistics, and names may be reserved by now."""
    family = families["BERT"]
    model, batch = recognising(family, 2), inputs_of(family, 0, seed=3)
    model.save_pretrained(tmp_path / "saved")
    index = read_json(tmp_path / "saved" / CONFIG_FILE)
    for entry in index["tasks"]:
        del entry["statistics"]
    index["tasks"][1]["name"] = "random"
    write_json(tmp_path / "saved" / CONFIG_FILE, index | {"last_learned": "random"})
    model = QTuningModel.from_pretrained(model.detach(), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"needs statistics, which task-0, random lack; call record_statistics"):
        model(**batch, task_names="infer")
    for task, name in enumerate(model.tasks):
        model.record_statistics(name, [inputs_of(family, task, 24) | {"labels": torch.arange(24) % (2 + task)}])
        assert model.infer_tasks(**batch).left_out == (("random",) if task == 0 else ())
    expected = model.infer_tasks(**batch).class_probabilities
    model.save_pretrained(tmp_path / "saved")
    model = QTuningModel.from_pretrained(model.detach(), tmp_path / "saved", lazy=True)
    assert torch.equal(model.infer_tasks(**batch).class_probabilities, expected)
    with pytest.raises(ValueError, match=r"'closed-form' needs statistics, which first, second, third lack"):
        QTuningModel.from_pretrained(base, older).infer_tasks(input_ids=IDS)


def damage(folder: Path) -> None:
    (path,) = folder.glob("statistics-001-*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop(folder: Path) -> None:
    next(folder.glob("statistics-001-*")).unlink()


def swap(folder: Path) -> None:
    one, other = sorted(folder.glob("statistics-00[12]-*"))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def take_anothers(folder: Path) -> None:
    other = read_json(folder / CONFIG_FILE)["tasks"][2]["statistics"]
    changed(folder, "task-1", file=other["file"], sha256=other["sha256"])


def take_an_adapter(folder: Path) -> None:
    other = read_json(folder / CONFIG_FILE)["tasks"][1]
    changed(folder, "task-1", file=other["file"], sha256=other["sha256"])


@pytest.mark.parametrize("harm", [damage, drop, swap, take_anothers, take_an_adapter])
def test_statistics_that_are_not_those_that_were_saved_are_refused_by_task(
    tmp_path: Path, families: Any, recognising: Any, inputs_of: Any, harm: Any
) -> None:
    family = families["BERT"]
    model = recognising(family, 3)
    model.save_pretrained(tmp_path)
    harm(tmp_path)
    named = "the statistics of task 'task-1' cannot be read"
    base_model = model.detach()
    with pytest.raises(CorruptFileError, match=named):
        QTuningModel.from_pretrained(base_model, tmp_path)
    model = QTuningModel.from_pretrained(base_model, tmp_path, lazy=True)
    batch = inputs_of(family, 1)
    assert model(**batch, task_names=["task-1"] * 6).logits.isfinite().all()  # the adapter is whole
    for call in (lambda: model.infer_tasks(**batch), lambda: model(**batch, task_names="infer")):
        with pytest.raises(CorruptFileError, match=named):
            call()
    other = recognising(family, 1)
    with pytest.raises(CorruptFileError, match=named):
        other.load_task(tmp_path, "task-1")
    assert other.tasks == ["task-0"] and list(other.statistics) == ["task-0"]  # no half of it
    model.record_statistics("task-1", [batch | {"labels": torch.arange(6) % 3}])  # heals it
    if harm is not swap:  # which harms another one too
        assert model.infer_tasks(**batch).tasks == ("task-0", "task-1", "task-2")


@pytest.mark.parametrize(
    "changes",
    [{"classes": 2}, {"classes": "3"}, {"feature_maps": "features"}, {"feature_maps": [1]}, {"bytes": -1}],
)
def test_an_index_of_statistics_that_is_wrong_is_refused(
    tmp_path: Path, families: Any, recognising: Any, changes: dict[str, Any]
) -> None:
    recognising(families["BERT"], 2).save_pretrained(tmp_path)
    changed(tmp_path, "task-1", **changes)
    for lazy in (False, True):
        with pytest.raises(CorruptFileError, match="the statistics of task 'task-1' are invalid"):
            read_checkpoint(tmp_path, lazy=lazy)
    index = read_json(tmp_path / CONFIG_FILE)
    for wrong, said in ((None, "is not an index of a saved model"), ({"classes": 3}, "the index names None")):
        index["tasks"][1]["statistics"] = wrong
        write_json(tmp_path / CONFIG_FILE, index)
        with pytest.raises(CorruptFileError, match=said):
            read_checkpoint(tmp_path)


# The rule that infers tasks


def test_a_rule_of_the_library_is_saved_and_another_is_missed(families: Any, recognising: Any, tmp_path: Path) -> None:
    model = recognising(families["BERT"], 2)
    model.save_pretrained(tmp_path)
    assert "task_rule" not in read_json(tmp_path / CONFIG_FILE), "as in earlier versions"
    model.task_rule = RanPAC(size=9, seed=3)
    model.save_pretrained(tmp_path)
    read = QTuningModel.from_pretrained(families["BERT"].base_model(), tmp_path)
    assert isinstance(read.task_rule, RanPAC) and read.task_rule.settings == {"size": 9, "seed": 3}
    assert read.lacking_statistics() == ["task-0", "task-1"] and read.lacking_statistics("closed-form") == []

    class Mine(TaskRule):
        name = "mine"

    model.task_rule = Mine()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="saved with the task rule 'mine', which is not among those of this library"):
        read = QTuningModel.from_pretrained(families["BERT"].base_model(), tmp_path)
    assert read.task_rule.name == "closed-form"
