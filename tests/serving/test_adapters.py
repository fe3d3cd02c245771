"""Adapters that come and go: all checks of loading from disk, one truth for all replicas, and what a restart finds."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

import torch
from safetensors import torch as safetensors

from qtuning_fast import QTuningModel
from qtuning_fast.model.checked_files import read_json, write_json
from qtuning_fast.serving import adapters as module
from qtuning_fast.serving.engine import Engine
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.serving.schema import Answer, Asked, Refused

TEXT = "the red one was a cat"


def answer(engine: Engine, task: str, text: str = TEXT) -> Answer:
    (reply,) = engine.answer([Asked(text, task)])
    assert isinstance(reply, Answer), reply
    return reply


def refused(call, *arguments) -> Refused:
    with pytest.raises(Refused) as caught:
        call(*arguments)
    return caught.value


def with_index(folder: Path, change) -> bytes:
    """The run's index after a change, with the checksum of its new content."""
    index = read_json(folder / "adapter" / "adapter_config.json")
    change(index)
    write_json(folder / "changed.json", index)
    return (folder / "changed.json").read_bytes()


def test_an_added_adapter_answers_as_the_one_it_was(engine, sending):
    described, was_there = engine.put("painted", sending("colours"))
    assert not was_there and described.is_added and described.is_inferred
    one, other = answer(engine, "painted"), answer(engine, "colours")
    assert one.outputs == pytest.approx(other.outputs, abs=1e-6) and one.adapter == other.adapter
    assert engine.answer([Asked(TEXT, "painted/2")])[0].status == 404


def test_replaced_and_removed_adapters(engine, sending):
    before, animals = answer(engine, "warm"), answer(engine, "animals")
    assert engine.put("warm", sending("animals"))[1] is True
    after = answer(engine, "warm")
    assert after.adapter != before.adapter and after.outputs == pytest.approx(animals.outputs, abs=1e-6)
    engine.remove("warm")
    assert engine.answer([Asked(TEXT, "warm")])[0].status == 404
    assert refused(engine.remove, "warm").status == 404
    engine.put("warm", sending("warm"))
    assert answer(engine, "warm").outputs == pytest.approx(before.outputs, abs=1e-6)


def test_inference_knows_what_comes_and_goes(engine, sending):
    engine.remove("colours")
    engine.remove("warm")
    (reply,) = engine.answer([Asked(TEXT)])
    assert reply.task == "animals" and reply.inferred.task_probability == pytest.approx(1)
    engine.put("painted", sending("colours"))
    engine.put("unseen", sending("warm", statistics=None))
    assert [each.name for each in engine.tasks().tasks if each.is_inferred] == ["animals", "painted"]
    assert {each.task for each in engine.answer([Asked(TEXT)])[0].inferred.others} < {"animals", "painted"}


def test_all_replicas_agree_at_once_and_a_restart_finds_it(run, engine, sending):
    other = Engine(run, ServingOptions())
    engine.put("painted", sending("colours"))
    engine.remove("animals")
    assert answer(other, "painted").adapter == answer(engine, "painted").adapter
    assert other.answer([Asked(TEXT, "animals")])[0].status == 404
    other.put("animals", sending("warm"))
    assert answer(engine, "animals").outputs == answer(other, "animals").outputs
    again = Engine(run, ServingOptions())
    assert again.tasks() == engine.tasks() == other.tasks()
    assert answer(again, "animals").outputs == pytest.approx(answer(engine, "warm").outputs, abs=1e-6)
    # The run itself is as it was.
    assert [each["name"] for each in read_json(run / "adapter" / "adapter_config.json")["tasks"]][1] == "animals"


def test_changes_of_several_replicas_at_once_are_all_kept(run, sending):
    engines, sent = [Engine(run, ServingOptions()) for _ in range(3)], sending("colours")
    threads = [
        threading.Thread(target=lambda engine=engine, n=n: [engine.put(f"task-{n}-{k}", sent) for k in range(5)])
        for n, engine in enumerate(engines)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {engine.tasks().total for engine in engines} == {3 + 15}


def test_files_that_nothing_names_stay_for_a_while(run, engine, sending, monkeypatch):
    folder = run / "served"
    engine.put("painted", sending("colours"))
    engine.remove("painted")
    assert len(list(folder.glob("task-*"))) == 1  # a batch that has begun may read it
    monkeypatch.setattr(module, "_KEPT_SECONDS", -1.0)
    engine.put("furry", sending("animals"))
    assert len(list(folder.glob("task-*"))) == 1 and answer(engine, "furry").labels


def test_files_that_were_in_use_until_now_stay_however_old_they_are(run, engine, sending):
    folder = run / "served"
    for change in (lambda: engine.put("painted", sending("animals")), lambda: engine.remove("painted")):
        engine.put("painted", sending("colours"))
        other = Engine(run, ServingOptions())  # has not read the files yet
        used = [folder / name for name in module._files(read_json(folder / "adapter_config.json"))]
        assert len(used) == 2
        for path in used:
            os.utime(path, (0, 0))  # put long ago
        change()
        assert all(path.exists() for path in used)
        assert isinstance(other._answers([Asked(TEXT, "painted")])[0], Answer)  # of a batch that began before


def test_another_entry_of_the_same_tensors_is_another_version(run, engine, sending):
    def with_labels(content):
        content["tasks"][0]["label_names"] = [name.upper() for name in content["tasks"][0]["label_names"]]

    other = Engine(run, ServingOptions())
    engine.put("painted", sending("colours"))
    before = [answer(each, "painted") for each in (engine, other)]
    assert before[0].adapter == before[1].adapter == answer(engine, "colours").adapter
    engine.put("painted", sending(index=with_index(run, with_labels)))
    for each in (engine, other, Engine(run, ServingOptions())):
        after = answer(each, "painted")
        assert after.labels == [name.upper() for name in before[0].labels]
        assert after.adapter == each.task("painted").adapter != before[0].adapter
    without = engine.put("painted", sending(statistics=None))[0]
    assert without.adapter not in (before[0].adapter, after.adapter)
    engine.put("painted", sending("colours"))
    assert answer(other, "painted").adapter == before[0].adapter


def test_what_does_not_fit_is_refused_by_name(run, engine, sending):
    good = sending("colours")
    flipped = good.tensors[:-1] + bytes([good.tensors[-1] ^ 1])
    index = json.loads(good.index)

    def of_another_model(content):
        content["base_model"]["fingerprint"] = "0" * 64

    def of_another_place(content):
        content["config"]["placement"] = "input"

    def of_another_version(content):
        content["format_version"] = 99

    def with_more_rows(content):
        content["tasks"][0]["prefix_rows"] += 1

    cases = {
        "is damaged: its content does not match its SHA-256": sending(tensors=flipped),
        "the adapter of task 'colours' cannot be read": sending(tensors=b""),
        "not valid JSON": sending(index=b"\xff{"),
        "does not match its checksum": sending(index=json.dumps(index | {"last_learned": "x"}).encode()),
        "is not an index of a saved model": sending(index=with_index(run, lambda content: content.pop("tasks"))),
        "made for another base model": sending(index=with_index(run, of_another_model)),
        "have placement='input'": sending(index=with_index(run, of_another_place)),
        "has format version 99": sending(index=with_index(run, of_another_version)),
        "does not hold what its index says": sending(index=with_index(run, with_more_rows)),
        "the index has no task 'cars', but colours, animals": sending(name_in_index="cars"),
        "the statistics of task 'colours' cannot be read": sending(statistics=good.tensors),
        "leave it out": sending(label_words='["a", "b"]'),
        "reads texts as they are": sending(template="{text}"),
    }
    before = engine.tasks()
    for said, sent in cases.items():
        found = refused(engine.put, "new", sent)
        assert found.status == 422 and said in found.message, (said, found)
        assert found.field in ("index", "tensors", "statistics", "label_words", "template") and "/" not in found.message
    for name in ("infer", " x", "x" * 201, "a\nb", ""):
        assert refused(engine.put, name, good).field == "name"
    assert engine.tasks() == before and not list((run / "served").glob("*.safetensors"))


def test_a_path_in_an_index_leads_nowhere(run, engine, sending, tmp_path):
    def elsewhere(content):
        content["tasks"][0]["file"] = "../../../../etc/passwd"
        content["tasks"][0]["statistics"]["file"] = str(tmp_path / "x")

    engine.put("new", sending(index=with_index(run, elsewhere)))  # the names in it are of no account
    assert answer(engine, "new").adapter == answer(engine, "colours").adapter
    assert not (tmp_path / "x").exists()


def test_numbers_that_are_not_finite_are_refused(run, engine, sending):
    tensors = safetensors.load(sending("colours").tensors)
    tensors["head.bias"][0] = torch.nan
    data = safetensors.save(tensors)
    import hashlib

    def named(content):
        content["tasks"][0]["sha256"] = hashlib.sha256(data).hexdigest()

    found = refused(engine.put, "new", sending(index=with_index(run, named), tensors=data))
    assert (found.status, found.field) == (422, "tensors")
    assert "head.bias holds values that are not finite" in found.message


def test_there_is_a_limit_on_tasks(run, sending):
    engine = Engine(run, ServingOptions(max_tasks=4))
    engine.put("fourth", sending())
    found = refused(engine.put, "fifth", sending())
    assert found.status == 409 and "there are 4 tasks already" in found.message
    assert engine.put("fourth", sending("warm"))[1] is True


def test_a_damaged_index_refuses_and_then_recovers(run, engine, sending):
    engine.put("new", sending())
    path = run / "served" / "adapter_config.json"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    (reply,) = engine.answer([Asked(TEXT, "warm")])
    assert (reply.status, reply.retry_after) == (503, 5) and "cannot be read" in reply.message
    path.write_bytes(content)
    assert answer(engine, "warm").labels and answer(engine, "new").labels


def test_an_adapter_whose_file_is_lost_harms_no_other(run, engine, sending):
    engine.put("new", sending())
    for path in (run / "served").glob("task-*"):
        path.unlink()
    lost, there = Engine(run, ServingOptions()).answer([Asked(TEXT, "new"), Asked(TEXT, "warm")])
    assert isinstance(lost, Refused) and "is missing" in lost.message
    assert (lost.status, lost.retry_after) == (503, 5)
    assert isinstance(there, Answer)


def test_a_model_loads_several_tasks_of_an_index_lazily(run, engine):
    """The public call that replicas use, on a saved model: all of the tasks or none."""
    saved = engine._saved.model
    model = QTuningModel(saved.detach(), saved.qtuning_config)
    with pytest.raises(ValueError, match="task 'cars' is not among those"):
        model.load_tasks(run / "adapter", ["colours", "cars"], lazy=True)
    assert model.tasks == []
    model.load_tasks(run / "adapter", ["colours", "warm"], lazy=True)
    assert model.tasks == ["colours", "warm"] and model.adapters.bytes_in_memory == 0
    with pytest.raises(ValueError, match="task 'warm' is finished already"):
        model.load_tasks(run / "adapter", ["animals", "warm"])
    assert model.tasks == ["colours", "warm"]
