"""Predicted times: their arithmetic here, real kernels and published speeds through the real compiler."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtuning_fast.bench.predictions import predict
from qtuning_fast.bench.predictions.cost_model import H100, H200, Cache, tensors, times_of
from qtuning_fast.bench.predictions.loop_counts import Place
from qtuning_fast.bench.predictions.predict import launches, roofline, saved
from qtuning_fast.bench.predictions.sass import CodeError, Loop
from qtuning_fast.bench.shapes import BERT_BASE, LLAMA_8B

ROOT = Path(__file__).parents[3]


def in_a_process(code: str) -> str:
    """What the code prints in a process of its own: in this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


START = """
import json, triton
from dataclasses import asdict, replace
from qtuning_fast.bench.predictions import predict, published
from qtuning_fast.bench.predictions.compile_report import AbsentDriver
from qtuning_fast.bench.predictions.cost_model import H100, H200
from qtuning_fast.bench.shapes import MINILM
triton.runtime.driver.set_active(AbsentDriver("sm_90"))
"""


def test_a_real_step():
    shape = "replace(MINILM, B={B}, P=20)"
    code = (
        START
        + f"""
rows = [{{name: asdict(p) for name, p in predict.step(shape, device)}} for shape, device in (
    ({shape.format(B=32)}, H100), ({shape.format(B=64)}, H100), ({shape.format(B=64)}, H200))]
print(json.dumps(rows))
"""
    )
    half, whole, on_h200 = json.loads(in_a_process(code))
    assert set(whole) >= {"forward", "prefix"} and all(0 < row["registers"] for row in whole.values())
    for name in whole:
        assert 1 < half[name]["microseconds"] <= whole[name]["microseconds"] < 200
        assert on_h200[name]["microseconds"] <= whole[name]["microseconds"] * 1.01
        assert set(whole[name]["busy"]) >= {"issue", "tensor"} and whole[name]["bound"]
    lowest = sum(microseconds for microseconds, _ in roofline(predict.MINILM, H100).values())
    assert sum(row["microseconds"] for row in whole.values()) > lowest


def test_tensors_that_the_cache_holds_need_no_memory():
    cache = Cache(capacity=100)
    assert cache.missing({"a": 40, "b": 40}) == 80
    assert cache.missing({"b": 40, "c": 40}) == 40  # pushes out a
    assert cache.missing({"a": 40}) == 40


def test_a_tensor_counts_once_wherever_it_stands():
    launch = dict(launches(replace(BERT_BASE, B=1)))["forward"]
    x = launch.arguments["query"].pointer
    assert tensors([x, (x[:], 3), {}])[x.untyped_storage()._cdata] == x.numel() * x.element_size()
    assert len(tensors(launch.arguments.values())) >= 6


def test_loops_are_matched_by_line_and_inlined_ones_by_order():
    loops = [Loop(0, 5, "a.py", 7), Loop(10, 15, "a.py", 7), Loop(20, 25, "b.py", 1)]
    first, second = Place("a.py", 7, (("a.py", 20),)), Place("a.py", 7, (("a.py", 30),))
    assert times_of(loops, [{first: 2, Place("b.py", 1): 4}, {second: 3, Place("b.py", 1): 0}]) == [
        [2, 0, 4],
        [0, 3, 0],
    ]
    assert times_of(loops[2:], [{Place("c.py", 1): 1}]) == [[0]]  # what runs once is no loop any more


def test_a_loop_that_is_not_recognised_is_named():
    with pytest.raises(CodeError, match=r"c\.py:9 is 0 loops in the code and 1 in the source, run 6 times"):
        times_of([Loop(0, 5, "a.py", 7)], [{Place("a.py", 7): 1, Place("c.py", 9): 6}])


def test_floors_of_both_devices():
    for device in (H100, H200):
        assert roofline(LLAMA_8B, device)["backward"][1] == "products"
    assert roofline(BERT_BASE, H200)["forward"][0] < roofline(BERT_BASE, H100)["forward"][0]


def test_rows_take_the_place_of_those_saved_before(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "FOLDER", tmp_path)
    assert saved("h100") == []
    rows = [{"shape": shape, "microseconds": time} for shape, time in (("vit-b16", 2.0), ("minilm", 1.0))]
    predict.save("h100", rows, by=("shape",))
    predict.save("h100", [{"shape": "vit-b16", "microseconds": 3.0}], by=("shape",))
    assert saved("h100") == [rows[1], {"shape": "vit-b16", "microseconds": 3.0}]


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(predict, "INTERPRETED", True)
    with pytest.raises(SystemExit):
        predict.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_a_step_names_its_kernels():
    names = [name for name, _ in launches(replace(BERT_BASE, B=1), torch.bfloat16)]
    assert names == ["fold", "forward", "fold", "queries", "keys", "prefix", "reweighting"]
