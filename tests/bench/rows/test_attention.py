"""Runs end in a file and a table; a budget that is spent is said so."""

import json
import time

import pytest
import torch

from qtuning_fast.bench import measure
from qtuning_fast.bench.plans import archive
from qtuning_fast.bench.plans.schedule import DIED, DONE, NO_TIME, RESTART, UNDER_WAY
from qtuning_fast.bench.results import Results
from qtuning_fast.bench.rows import attention, command, growth, ingredients
from qtuning_fast.bench.rows.roofline import Ceilings
from qtuning_fast.bench.shapes import TINIES


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    def here(function, *arguments):
        if function is attention.measured_ceilings:
            return Ceilings(flops=1e12, copied=1e11, read=1e11, special=0.0)
        return function(*arguments, **({"peaks": ()} if function.func is attention.measure else {}))

    monkeypatch.setattr(measure, "_peak", lambda *arguments: 0)

    monkeypatch.setattr(attention, "in_a_process", here)
    monkeypatch.setattr(command, "in_a_process", here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_run_writes_after_each_shape(tmp_path, capsys):
    out = tmp_path / "new" / "attention.json"
    run = ["--peer", "eager", "--dry-run", "--out", str(out), "--shape", "tiny", "tiny-causal"]
    assert attention.main(run) == 0
    document = json.loads(out.read_text())
    assert list(document["entries"]) == ["tiny", "tiny-causal"] and document["ceilings"]["flops"] == 1e12
    assert document["command"].endswith("attention " + " ".join(run))
    text = capsys.readouterr().out
    assert "tiny-causal: B2" in text and max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("module", "entries"),
    [
        (attention, {shape.name for shape in TINIES if shape.trained}),
        pytest.param(growth, {"N", "P", "B", "tasks"}, marks=pytest.mark.thorough),
        (ingredients, {"tiny composed"}),
    ],
    ids=lambda x: getattr(x, "__name__", "").split(".")[-1],
)
def test_a_rehearsal_of_each_question_ends_in_a_file_and_a_table(module, entries, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert module.main(["--dry-run", "--peer", "composed", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["entries"].keys() == entries and not document["errors"]
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_decoding_has_shapes_and_a_file_of_its_own(tmp_path):
    out = tmp_path / "out.json"
    assert attention.main(["--decode", "--dry-run", "--peer", "composed", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["question"] == "decode" and document["entries"].keys() == {"tiny-decode"}


def within_a_plan(tmp_path, *more, seconds=1000.0):
    ceilings = tmp_path / "ceilings.json"
    ceilings.write_text(json.dumps({"ceilings": {"flops": 2e12, "copied": 1e11, "read": 1e11, "special": 0.0}}))
    run = ["--dry-run", "--shape", "tiny", "tiny-causal", "--peer", "eager", "sdpa", "--out", str(tmp_path / "a.json")]
    run += ["--deadline", str(time.monotonic() + seconds), "--ceilings", str(ceilings), *more]
    status = attention.main(run)
    return status, json.loads((tmp_path / "a.json").read_text())


def test_within_a_plan_each_row_is_written_as_it_comes(tmp_path, monkeypatch):
    """And what is timed alone is timed again beside the others."""
    seen, add = [], Results.add

    def heard(self, name, entry):
        rows = {peer: (row["step"]["eager"] or {}).get("median") for peer, row in entry["rows"].items()}
        seen.append((name, [peer for peer, ms in rows.items() if ms]))
        add(self, name, entry)

    monkeypatch.setattr(Results, "add", heard)
    status, document = within_a_plan(tmp_path)
    assert status == 0 and document["ceilings"]["flops"] == 2e12
    assert seen[:3] == [("tiny", ["eager"]), ("tiny", ["eager", "sdpa"]), ("tiny", ["eager", "sdpa"])]
    units = {name: entry["status"] for name, entry in document["units"].items()}
    assert set(units.values()) == {DONE}
    assert list(units)[:3] == ["tiny: eager", "tiny: sdpa", "tiny: in turns"]


def test_what_there_is_no_time_for_is_said_so(tmp_path):
    status, document = within_a_plan(tmp_path, seconds=0.0)
    rows = [row for entry in document["entries"].values() for row in entry["rows"].values()]
    assert status == 0 and len(rows) == 4 and {row["error"] for row in rows} == {NO_TIME}


def test_a_process_goes_on_where_the_one_before_it_died(tmp_path, monkeypatch):
    _, before = within_a_plan(tmp_path)
    before["units"] = {"tiny: eager": {"status": DONE, "expected": 1.0, "took": 1.0}}
    before["units"]["tiny: sdpa"] = {"status": UNDER_WAY, "expected": 1.0, "took": None}
    del before["entries"]["tiny"]["rows"]["sdpa"], before["entries"]["tiny-causal"]
    (tmp_path / "a.json").write_text(json.dumps(before))
    _, after = within_a_plan(tmp_path)
    rows = after["entries"]["tiny"]["rows"]
    assert rows["eager"] == before["entries"]["tiny"]["rows"]["eager"] and rows["sdpa"]["error"] == DIED
    assert after["entries"]["tiny-causal"]["rows"]["sdpa"]["step"]["eager"]


def test_an_error_that_breaks_the_process_is_written_before_it_makes_way(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "broken", lambda device: True)
    with pytest.raises(SystemExit) as left:
        within_a_plan(tmp_path)
    document = json.loads((tmp_path / "a.json").read_text())
    assert left.value.code == RESTART and document["entries"]["tiny"]["rows"].keys() == {"eager"}


def test_what_an_earlier_run_brought_home_is_left_out(tmp_path):
    within_a_plan(tmp_path)
    earlier = json.loads((tmp_path / "a.json").read_text())
    earlier["units"]["tiny-causal: sdpa"]["status"] = NO_TIME
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    (tmp_path / "a.json").unlink()
    _, document = within_a_plan(tmp_path, "--rest-of", str(tmp_path / "earlier.json"))
    rows = {name: list(entry["rows"]) for name, entry in document["entries"].items()}
    assert rows == {"tiny-causal": ["eager", "sdpa"]}  # all of the shape: only rows that took turns compare
    assert attention.at_home(tmp_path / "none.json") == set()


@pytest.mark.parametrize("what", ["unit", "row"])
def test_a_shape_whose_turns_are_missing_is_measured_again(tmp_path, what):
    _, earlier = within_a_plan(tmp_path)
    assert all(row["turns"] for entry in earlier["entries"].values() for row in entry["rows"].values())
    if what == "unit":
        earlier["units"]["tiny: in turns"]["status"] = NO_TIME
    else:  # as a second process of the step leaves it
        earlier["entries"]["tiny"]["rows"]["eager"]["turns"] = False
    (tmp_path / "a.json").write_text(json.dumps(earlier))
    home = attention.at_home(tmp_path / "a.json")
    assert attention.is_missing("tiny", ["eager"], home) and not attention.is_missing("tiny-causal", ["eager"], home)


@pytest.mark.parametrize("found", [{}, {"ceilings": None}])
def test_ceilings_that_are_not_there_are_measured_again_or_done_without(tmp_path, monkeypatch, capsys, found):
    ceilings = tmp_path / "cut-off.json"
    ceilings.write_text(json.dumps(found | {"entries": {}}))  # as the step writes it before it has measured anything
    _, document = within_a_plan(tmp_path, "--ceilings", str(ceilings))
    assert document["ceilings"]["flops"] == 1e12

    def fails(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(attention, "in_a_process", fails)
    (tmp_path / "a.json").unlink()
    status, document = within_a_plan(tmp_path, "--ceilings", str(ceilings))
    assert status == 0 and document["ceilings"] is None and "floor_ms" not in document["entries"]["tiny"]
    assert document["entries"]["tiny"]["rows"]["eager"]["step"]["eager"]
    printed = capsys.readouterr().out
    assert "not measured, RuntimeError: out of memory" in printed and "roofline: unknown" in printed
    assert archive.summary(
        {"plan": "gpu", "device": {"name": "x"}, "date": "", "steps": [], "documents": {"attention": document}}
    )


def test_shapes_that_have_not_taken_turns_come_first_in_a_second_run():
    home = {"a: in turns", "a: fused", "b: fused"}
    assert attention.most_missing_first(["a", "b", "c"], home) == ["b", "c", "a"]
    assert attention.most_missing_first(["a", "b", "c"], ()) == ["a", "b", "c"]
