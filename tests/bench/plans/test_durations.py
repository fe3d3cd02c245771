"""What a plan expects comes from what was predicted and measured, where there is such a file."""

import json

import pytest
import torch

from qtuning_fast.bench.measure import QUICK
from qtuning_fast.bench.plans import durations
from qtuning_fast.bench.plans.candidates import candidates
from qtuning_fast.bench.plans.tune import Job, incumbent_of
from qtuning_fast.bench.rows import attention, tables
from qtuning_fast.bench.shapes import BERT_BASE, LLAMA_8B, VIT_B16


@pytest.fixture
def predicted(tmp_path, monkeypatch):
    """Files of predictions in a folder of their own; forgotten afterwards."""
    monkeypatch.setattr(durations, "PREDICTED", tmp_path)
    known = (durations._steps, durations._candidates)

    def write(name, *rows):
        (tmp_path / name).write_text(json.dumps({"rows": rows}))
        for function in known:
            function.cache_clear()

    write("none.json")
    yield write
    for function in known:
        function.cache_clear()


def test_a_step_takes_the_sum_of_its_kernels_where_they_are_predicted(predicted):
    assert durations.step_ms(BERT_BASE) == durations.ESTIMATES["bert-base"]
    rows = [{"shape": "bert-base", "kernel": name, "microseconds": 20.0} for name in ("forward", "queries", "keys")]
    predicted("h100.json", *rows)
    assert durations.step_ms(BERT_BASE) == pytest.approx(0.06)
    assert durations.step_ms(BERT_BASE, "flex-frozen-gate") > durations.step_ms(BERT_BASE, "fused-frozen-gate")
    assert durations.step_ms(VIT_B16) == durations.ESTIMATES["vit-b16"]


def test_a_measured_row_of_ours_stands_beside_what_was_predicted_of_it(predicted, monkeypatch):
    assert attention.predicted(BERT_BASE, "cpu") == {}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert attention.predicted(BERT_BASE, "cuda") == {}  # nothing is predicted
    kernels = ("fold", "forward", "fold", "queries", "keys")
    predicted("h200.json", *({"shape": "bert-base", "kernel": name, "microseconds": 20.0} for name in kernels))
    found = attention.predicted(BERT_BASE, "cuda")
    assert found == {"predicted_ms": {"fused": {"forward": pytest.approx(0.04), "step": pytest.approx(0.1)}}}
    timing = {"graph": {"median": 0.12}, "eager": None}
    row = {"forward": {"graph": None, "eager": None}, "step": timing}
    assert tables.predictions(found | {"rows": {"fused": row}}) == [
        "  predicted of fused: step 0.1000 ms, measured 0.1200 (+20%)"
    ]
    assert tables.predictions(found | {"rows": {}}) == tables.predictions({"rows": {"fused": row}}) == []


def test_a_candidate_is_found_by_all_that_makes_it_up(predicted):
    first, second, *_ = candidates(incumbent_of("sm_90", Job("bf16", 64, "keys")))
    row = {name: getattr(second, name) for name in durations.ENTRY} | {"microseconds": 30.0, "error": ""}
    predicted("h100-candidates.json", row, row | {"warps": 16, "error": "spills"})
    assert durations.candidate_ms(second) == pytest.approx(0.03)
    assert durations.candidate_ms(first) is None


def test_what_is_compiled_first_or_computes_more_is_given_more_time():
    seconds = {peer: durations.row_seconds(BERT_BASE, peer) for peer in ("fused", "flex-merged", "eager")}
    assert seconds["flex-merged"] > seconds["eager"] > seconds["fused"]
    peers = ["fused", "eager"]
    assert durations.turns_seconds(LLAMA_8B, peers, QUICK) != durations.turns_seconds(BERT_BASE, peers, QUICK) > 0
    kinds = [unit.kind for unit in durations.rows(BERT_BASE, ["fused", "eager"], QUICK, ("fused",))]
    assert kinds == ["row", "row", "turns", "memory"]
    assert 0.3 < durations.KERNEL < 3 and 0.1 < durations.LAUNCHER < 1  # measured
