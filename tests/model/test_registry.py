"""Adapters in memory and on disk: read when needed, dropped when there are too many, refused when damaged."""

import copy
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

import qtuning_fast.model.registry
from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.method.adapter import TaskAdapter
from qtuning_fast.model.checked_files import CorruptFileError, file_digest
from qtuning_fast.model.checkpoint import read_checkpoint
from qtuning_fast.model.registry import AdapterFile, AdapterRegistry

SMALL = {"prompt_length": 2, "queue_size": 3, "shared_length": 1, "reparameterization": None}


def an_adapter(name: str, rows: int = 3, seed: int = 0) -> TaskAdapter:
    generator = torch.Generator().manual_seed(seed)
    keys = tuple(torch.randn(2, rows, 4, generator=generator) for _ in range(2))
    gates = (torch.ones(()), torch.ones(()))
    return TaskAdapter(name, ("a", "b"), keys, keys, "tanh", gates, gates, torch.randn(2, 8), torch.zeros(2))


def learned(base: BertModel, tasks: int, **changes: Any) -> QTuningModel:
    model = QTuningModel(base, QTuningConfig(**(SMALL | changes)))
    for number in range(tasks):
        model.start_task(f"task-{number}", 2)
        model.finish_task()
    model.set_task(None)
    return model


@pytest.fixture
def saved(tiny_bert: BertModel, tmp_path: Path) -> Path:
    """A folder with four tasks."""
    model = learned(tiny_bert, 4)
    model.save_pretrained(tmp_path)
    model.detach()
    return tmp_path


def unread(store: AdapterRegistry) -> list[str]:
    return [entry.info.name for entry in store.entries() if entry.value is None]


def same(one: TaskAdapter, other: TaskAdapter) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return one.info == other.info and all(torch.equal(mine[name], theirs[name]) for name in {*mine, *theirs})


def test_it_is_read_like_a_dict() -> None:
    store = AdapterRegistry()
    first, second = an_adapter("first"), an_adapter("second")
    store.add(first.info, value=first)
    store.add(second.info, value=second)
    assert list(store) == ["first", "second"] and len(store) == 2 and "first" in store and "third" not in store
    assert [*store.values()] == [first, second] and dict(store.items())["second"] is second
    store.remove("first")
    assert list(store) == ["second"] and store.get("first") is None
    for call in (store.__getitem__, store.remove):
        with pytest.raises(KeyError):
            call("first")


def test_what_is_known_without_reading(saved: Path, tiny_bert: BertModel) -> None:
    eager = read_checkpoint(saved).adapters
    lazy = read_checkpoint(saved, lazy=True).adapters
    assert unread(lazy) == list(lazy) == list(eager) and unread(eager) == []
    for entry in lazy.entries():
        adapter = eager[entry.info.name]
        assert entry.info == adapter.info and entry.info.prefix_rows == adapter.keys[0].shape[1]
        assert entry.info.bytes == sum(tensor.nbytes for tensor in adapter.tensors().values())
    assert lazy.bytes_in_memory == 0
    assert same(lazy["task-2"], eager["task-2"]) and unread(lazy) == ["task-0", "task-1", "task-3"]
    assert lazy["task-2"] is lazy["task-2"]


def test_a_lazy_model_reads_what_it_computes_with(
    saved: Path, tiny_bert: BertModel, batch: dict[str, torch.Tensor]
) -> None:
    model = QTuningModel.from_pretrained(tiny_bert, saved)
    names = ["task-0", "task-2", "task-0", "task-2"]
    expected = model(**batch, task_names=names).logits
    model.detach()
    model = QTuningModel.from_pretrained(tiny_bert, saved, lazy=True)
    assert model.label_names("task-3") == ("0", "1") and model.tasks == [f"task-{number}" for number in range(4)]
    assert len(unread(model.adapters)) == 4
    assert torch.equal(model(**batch, task_names=names).logits, expected)
    assert unread(model.adapters) == ["task-1", "task-3"]
    model.set_task("task-1")
    assert unread(model.adapters) == ["task-3"]


def test_the_least_recently_used_ones_that_have_a_file_are_dropped(saved: Path) -> None:
    store = read_checkpoint(saved).adapters
    new = replace(store["task-3"], name="new")
    store.add(new.info, value=new)
    store["task-0"]
    each = store.entry("task-3").info.bytes
    store.host_bytes = 3 * each
    assert unread(store) == ["task-1", "task-2"]  # the first two are smaller
    assert store.bytes_in_memory <= 3 * each
    store["task-1"]
    assert unread(store) == ["task-2", "task-3"]
    store.host_bytes = 1
    assert unread(store) == ["task-0", "task-1", "task-2", "task-3"]  # what was never saved stays
    kept = store["task-2"]
    assert kept.name == "task-2" and "task-2" in unread(store)  # too large to be kept, and yet there
    store.host_bytes = None
    assert store["task-2"] is store["task-2"]


def test_what_was_saved_may_be_dropped(tiny_bert: BertModel, tmp_path: Path) -> None:
    model = learned(tiny_bert, 2)
    model.set_memory_limits(host_bytes=1)
    before = model.adapters["task-0"]
    assert unread(model.adapters) == []
    model.save_pretrained(tmp_path)
    assert unread(model.adapters) == ["task-0", "task-1"]
    assert same(model.adapters["task-0"], before)


def test_a_damaged_file_is_refused_by_name_when_it_is_needed(
    saved: Path, tiny_bert: BertModel, batch: dict[str, torch.Tensor]
) -> None:
    model = QTuningModel.from_pretrained(tiny_bert, saved, lazy=True)
    (path,) = saved.glob("task-001-*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    expected = model(**batch, task_names=["task-0", "task-2"] * 2).logits
    for call in (
        lambda: model(**batch, task_names=["task-0", "task-1"] * 2),
        lambda: model.set_task("task-1"),
        lambda: model.adapters["task-1"],
        lambda: model.save_pretrained(saved),
    ):
        with pytest.raises(CorruptFileError, match=r"task 'task-1' cannot be read.*damaged"):
            call()
    path.unlink()
    with pytest.raises(CorruptFileError, match=r"task 'task-1' cannot be read.*missing"):
        model.set_task("task-1")
    assert torch.equal(model(**batch, task_names=["task-0", "task-2"] * 2).logits, expected)
    base = model.detach()
    with pytest.raises(CorruptFileError, match="task-001"):
        QTuningModel.from_pretrained(base, saved)


def test_a_file_of_another_adapter_is_refused(saved: Path) -> None:
    store = read_checkpoint(saved, lazy=True).adapters
    other = store.entry("task-3").file
    assert other is not None
    with pytest.raises(CorruptFileError, match=r"'task-0'.*does not hold what its index says"):
        other.read(store.entry("task-0").info)
    with pytest.raises(CorruptFileError, match="'task-0'"):
        AdapterFile(saved, "state-0", "").read(store.entry("task-0").info)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_partly_unread_model_is_saved_whole(
    saved: Path, tiny_bert: BertModel, tmp_path_factory: pytest.TempPathFactory, lazy: bool
) -> None:
    expected = dict(read_checkpoint(saved).adapters)
    model = QTuningModel.from_pretrained(tiny_bert, saved, lazy=lazy)
    model.adapters["task-1"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    model.save_pretrained(elsewhere)
    assert len(unread(model.adapters)) == (3 if lazy else 0)
    again = read_checkpoint(elsewhere)
    assert list(again.adapters) == list(expected) and again.last_learned == "task-3"
    assert all(same(again.adapters[name], expected[name]) for name in expected)
    assert all(entry.file is not None and entry.file.folder == saved for entry in model.adapters.entries())


def test_a_save_into_the_same_folder_leaves_files_in_place(saved: Path, tiny_bert: BertModel) -> None:
    model = QTuningModel.from_pretrained(tiny_bert, saved, lazy=True)
    before = {path.name: path.stat().st_mtime_ns for path in saved.glob("task-*")}
    model.remove_task("task-1")
    model.save_pretrained(saved)
    assert unread(model.adapters) == ["task-0", "task-2", "task-3"]
    after = {path.name: path.stat().st_mtime_ns for path in saved.glob("task-*")}
    gone = before.keys() - after.keys()
    assert after.items() <= before.items() and [name[:8] for name in gone] == ["task-001"]
    model.start_task("task-4", 2)
    model.finish_task()
    model.save_pretrained(saved)
    assert list(read_checkpoint(saved).adapters) == ["task-0", "task-2", "task-3", "task-4"]
    assert QTuningModel.from_pretrained(model.detach(), saved, lazy=True).adapters["task-2"].name == "task-2"


def test_a_save_heals_a_file_whose_adapter_is_in_memory(saved: Path, tiny_bert: BertModel) -> None:
    model = QTuningModel.from_pretrained(tiny_bert, saved)
    (path,) = saved.glob("task-001-*")
    path.write_bytes(b"")
    model.save_pretrained(saved)
    assert same(read_checkpoint(saved).adapters["task-1"], model.adapters["task-1"])


def test_a_save_reads_no_file_through_that_it_knows(
    tiny_bert: BertModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_through: list[str] = []

    def noted(path: Path) -> str:
        read_through.append(path.name[:8])
        return file_digest(path)

    monkeypatch.setattr(qtuning_fast.model.registry, "file_digest", noted)
    model = QTuningModel(tiny_bert, QTuningConfig(**SMALL))
    for number in range(6):
        model.start_task(f"task-{number}", 2)
        model.finish_task()
        model.save_pretrained(tmp_path)
    assert read_through == [f"task-00{number}" for number in range(5)]  # each by the save after its own
    (path,) = tmp_path.glob("task-001-*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))  # whatever the clock's resolution
    model.save_pretrained(tmp_path)
    assert read_through[5:] == ["task-001", "task-005"]
    assert same(read_checkpoint(tmp_path).adapters["task-1"], model.adapters["task-1"])


def test_many_threads_read_at_once(saved: Path) -> None:
    expected = dict(read_checkpoint(saved).adapters)
    store = read_checkpoint(saved, lazy=True).adapters
    store.host_bytes = store.entry("task-3").info.bytes * 2
    start = threading.Barrier(4)

    def read(worker: int) -> int:
        start.wait()
        for number in range(100):
            name = f"task-{(number * (worker + 1)) % 4}"
            assert same(store[name], expected[name])
            assert store.bytes_in_memory <= store.host_bytes
            new = replace(expected[name], name=f"new-{worker}")
            store.add(new.info, value=new)
            assert list(store)[:4] == list(expected)
            store.remove(f"new-{worker}")
        return worker

    store.host_bytes += 4 * store.entry("task-3").info.bytes
    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(read, range(4))) == [0, 1, 2, 3]
    assert list(store) == list(expected)


def test_a_model_can_be_copied(tiny_bert: BertModel, batch: dict[str, torch.Tensor]) -> None:
    model = learned(tiny_bert, 2)
    names = ["task-0", "task-1"] * 2
    expected = model(**batch, task_names=names).logits
    twin = copy.deepcopy(model)
    model.remove_task("task-0")
    assert twin.tasks == ["task-0", "task-1"]
    assert torch.equal(twin(**batch, task_names=names).logits, expected)


def test_a_pickled_registry_is_a_registry_of_its_own(saved: Path) -> None:
    store = read_checkpoint(saved).adapters
    other = pickle.loads(pickle.dumps(store))
    other.host_bytes = 1
    assert unread(other) == list(other) == list(store) and unread(store) == []
    assert all(same(other[name], store[name]) for name in store)


def test_a_copy_may_come_to_lie_elsewhere(saved: Path, tmp_path: Path) -> None:
    store = read_checkpoint(saved, lazy=True).adapters
    other, one = store.copied(), store.copied("task-2")
    assert list(other) == list(store) and list(one) == ["task-2"] and list(store.copied("none")) == []
    moved = AdapterFile(tmp_path / "new", "task-000-0123456789ab.safetensors", "0" * 64)
    one.add(one.entry("task-2").info, file=moved)
    other.remove("task-0")
    assert store.entry("task-2").file != moved and "task-0" in store


def test_what_does_not_fit_is_named_by_its_file(saved: Path) -> None:
    def refuse(info: Any, adapter: TaskAdapter) -> None:
        if info.name == "task-1":
            raise TypeError("keys.0 is wrong")

    store = read_checkpoint(saved, lazy=True).adapters
    store.check_all(refuse)
    assert store["task-0"].name == "task-0"
    file = store.entry("task-1").file
    assert file is not None
    with pytest.raises(CorruptFileError, match=f"{file.file}: keys.0 is wrong"):
        store["task-1"]
    assert unread(store) == ["task-1", "task-2", "task-3"]
    with pytest.raises(CorruptFileError, match=f"{file.file}: keys.0 is wrong"):
        read_checkpoint(saved).adapters.check_all(refuse)
