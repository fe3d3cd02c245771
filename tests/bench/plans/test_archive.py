"""What a run has found goes to where it is read; a second run adds to it and makes nothing worse."""

import json

import pytest

from qtuning_fast.bench.plans import archive
from qtuning_fast.bench.plans.archive import merged, unpack
from qtuning_fast.bench.plans.schedule import NO_TIME


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """Unpacks a document of a run; returns the folder that it went to."""
    monkeypatch.setattr(archive, "ROOT", tmp_path)
    for path in archive.TABLES.values():
        (tmp_path / path).parent.mkdir(parents=True)

    def go(**changes):
        document = {"dry_run": False, "documents": {}, "tables": {}, "steps": []}
        document |= {"device": {"type": "cuda", "name": "NVIDIA H200"}} | changes
        source = tmp_path / "gpu.json"
        source.write_text(json.dumps(document))
        unpack(source)
        return tmp_path

    return go


def test_a_run_is_unpacked_to_where_it_is_read(unpacked):
    root = unpacked(
        documents={"growth": {"entries": {}}, "half": None},
        tables={"blocks.json": [{"a": 1}, {"b": 2}], "backend_order.json": []},
        steps=[{"name": "tuning", "status": "done"}, {"name": "choose", "status": NO_TIME}],
    )
    assert [path.name for path in (root / "bench/results/h200").iterdir()] == ["growth.json"]
    assert (root / "kernels/blocks.json").read_text() == '[\n  {"a": 1},\n  {"b": 2}\n]\n'
    assert not (root / archive.TABLES["backend_order.json"]).exists()  # which was not measured
    with pytest.raises(SystemExit, match="dry run"):
        unpacked(dry_run=True)


def test_what_a_second_run_adds_to_a_question_goes_into_its_file(unpacked):
    unpacked(documents={"attention": {"entries": {"a": {"rows": {"x": {"error": ""}}}}, "units": {"a: x": {}}}})
    rest = {"entries": {"a": {"rows": {"y": {"error": ""}, "x": {"error": NO_TIME}}}, "b": {"rows": {}}}, "units": {}}
    root = unpacked(documents={"attention-rest": rest})
    [path] = (root / "bench/results/h200").iterdir()
    found = json.loads(path.read_text())
    assert found["entries"]["a"]["rows"] == {"x": {"error": ""}, "y": {"error": ""}}
    assert found["entries"].keys() == {"a", "b"} and found["units"] == {"a: x": {}}
    assert merged(found, {"entries": {}}) == found


def test_what_a_step_adds_to_a_question_of_the_same_run_is_kept(unpacked):
    """Files are gathered by name, and "attention-gate.json" comes before "attention.json"."""
    added = {"entries": {"a": {"rows": {"y": {"error": ""}}}}}
    root = unpacked(documents={"attention-gate": added, "attention": {"entries": {"a": {"rows": {"x": {}}}}}})
    [path] = (root / "bench/results/h200").iterdir()
    assert json.loads(path.read_text())["entries"]["a"]["rows"].keys() == {"x", "y"}


def test_a_gpu_is_what_its_driver_says(monkeypatch):
    class Said:
        stdout = "NVIDIA H100 80GB HBM3, 81559\n"

    monkeypatch.setattr(archive.subprocess, "run", lambda *args, **options: Said)
    assert archive.device() == {"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "GiB": 79.6}

    def absent(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(archive.subprocess, "run", absent)
    assert archive.device() == "cpu"


def test_the_second_run_does_not_replace_rows_in_turns_by_rows_alone():
    def document(turns, ms):
        return {"entries": {"a": {"rows": {"x": {"error": "", "turns": turns, "ms": ms}}}}}

    assert merged(document(True, 1), document(False, 2))["entries"]["a"]["rows"]["x"]["ms"] == 1
    assert merged(document(False, 1), document(True, 2))["entries"]["a"]["rows"]["x"]["ms"] == 2
