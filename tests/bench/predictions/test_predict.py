"""The command for predicted times: what a step launches, what is saved, and the ratios that peers' parts come to."""

import json
from dataclasses import replace

import pytest

from qtuning_fast.bench.predictions import predict
from qtuning_fast.bench.predictions.cost_model import H100, H200
from qtuning_fast.bench.shapes import BERT_BASE, DECODE_64, LLAMA_8B


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (BERT_BASE, ["fold", "forward", "fold", "queries", "keys", "prefix", "reweighting"]),
        (replace(BERT_BASE, P=0), ["forward", "queries", "keys"]),
        (replace(BERT_BASE, trained=False), ["forward"]),
        (DECODE_64, ["merge"]),
    ],
    ids=["trained", "no prefix", "served", "decoding"],
)
def test_launches_of_a_step_are_those_that_run(shape, names):
    found = predict.launches(shape)
    programs = {name: launch.programs for name, launch in found}
    assert [name for name in names if name in programs] == names and all(programs.values())


def test_floors_of_both_gpus():
    for shape in (BERT_BASE, LLAMA_8B):
        h100, h200 = predict.roofline(shape, H100), predict.roofline(shape, H200)
        assert h100.keys() == h200.keys() == {"forward", "backward"}
        assert all(microseconds > 0 for microseconds, _ in h100.values())
    assert (
        predict.roofline(BERT_BASE, H200)["forward"][0] < predict.roofline(BERT_BASE, H100)["forward"][0]
    )  # it waits for bytes


def test_rows_replace_their_like(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "FOLDER", tmp_path / "predicted")
    assert predict.saved("h100") == []
    predict.save("h100", [{"shape": "a", "us": 1}, {"shape": "b", "us": 2}], by=("shape",))
    predict.save("h100", [{"shape": "a", "us": 3}], by=("shape",))
    assert {row["shape"]: row["us"] for row in predict.saved("h100")} == {"a": 3, "b": 2}
    assert json.loads((tmp_path / "predicted" / "h100.json").read_text())["versions"]["triton"]


def test_every_headline_shape_is_predicted_in_a_file():
    for name in ("h100", "h200"):
        shapes = {row["shape"] for row in predict.saved(name)}
        assert shapes >= {shape.name for shape in predict.HEADLINES}
        kernels = {row["kernel"] for row in predict.saved(name) if row["shape"] == "vit-b16"}
        assert kernels == {"fold", "forward", "queries", "keys", "prefix", "reweighting"}
