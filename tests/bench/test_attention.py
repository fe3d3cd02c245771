"""Runs end in a file and a table; a budget that is spent is said so."""

import json

import pytest
import torch

from qtuning_fast.bench import attention, decode, growth, ingredients, measure
from qtuning_fast.bench.floors import Ceilings
from qtuning_fast.bench.shapes import CPU, GPU, SHAPES, TINY, inputs


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    def here(function, *arguments):
        if function is attention.measured_ceilings:
            return Ceilings(flops=1e12, copied=1e11, read=1e11, special=0.0)
        return function(*arguments, **({"peaks": ()} if function.func is attention.measure else {}))

    monkeypatch.setattr(attention, "in_a_process", here)
    monkeypatch.setattr(measure, "in_a_process", here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_run_writes_after_each_shape_and_stops_at_its_budget(tmp_path, capsys):
    out = tmp_path / "new" / "attention.json"
    run = ["--peer", "eager", "--dry-run", "--out", str(out), "--shape", "tiny", "tiny-causal"]
    assert attention.main(run) == 0
    document = json.loads(out.read_text())
    assert list(document["entries"]) == ["tiny", "tiny-causal"] and document["ceilings"]["flops"] == 1e12
    assert document["command"].endswith("attention " + " ".join(run))
    text = capsys.readouterr().out
    assert "tiny-causal: B2" in text and max(map(len, text.splitlines())) <= 120
    assert attention.main([*run, "--budget-seconds", "0"]) == 1
    assert json.loads(out.read_text())["errors"].keys() == {"tiny", "tiny-causal"}


@pytest.mark.parametrize(
    ("module", "entries"),
    [
        (decode, {"tiny-decode"}),
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


def test_peers_are_compiled_ahead_for_as_long_as_there_is_time(monkeypatch, capsys):
    monkeypatch.setattr(attention, "default_dtype", lambda device: torch.float32)
    attention.compile_ahead([TINY], [], 5.0)
    assert capsys.readouterr().out == ""  # nobody
    attention.compile_ahead([TINY], ["eager"], 60.0)  # without a GPU it fails, and is not heard of
    assert capsys.readouterr().out.startswith("all of 1 peers compiled")
    attention.compile_ahead([TINY] * 50, ["eager"], 0.01)
    assert capsys.readouterr().out.startswith("some of 50 peers compiled")


def test_inputs_are_strided_as_models_hand_them_over():
    x = inputs(TINY, dtype=torch.bfloat16, device="cpu")
    assert x.query.transpose(1, 2).is_contiguous() and x.query.dtype == torch.bfloat16
    assert x.prefix_key.dtype == x.gate_tau.dtype == torch.float32 and x.U_key.shape == (TINY.P, 1)
    assert all(t.requires_grad for t in x.tracked().trained().values()) and not x.query.requires_grad
    assert not torch.equal(x.query, inputs(TINY, dtype=torch.bfloat16, device="cpu", seed=1).query)


def test_shapes_have_the_features_that_their_names_say():
    padded, mixed = SHAPES["bert-base-padded"], SHAPES["bert-base-mixed"]
    lengths = inputs(padded, dtype=torch.float32, device="cpu").mask.sum(-1)
    assert lengths.max() == 128 and lengths.min() == 64 and abs(lengths.float().mean() / 128 - 0.75) < 0.01
    index = inputs(mixed, dtype=torch.float32, device="cpu").prefix_index
    assert index.bincount().tolist() == [2] * 16 and index.tolist() != sorted(index.tolist())
    assert inputs(SHAPES["t5-large"], dtype=torch.float32, device="cpu").mask.shape == (1, 16, 512, 512)
    folded = inputs(SHAPES["decode-cpu"], dtype=torch.bfloat16, device="cpu")
    assert folded.prefix_key.dtype == torch.bfloat16 and folded.query.shape[2] == 1 and folded.key.shape[2] == 1024
    assert all(shape.of for shape in (*GPU, *CPU)) and len(SHAPES) == len({s.name for s in SHAPES.values()})
