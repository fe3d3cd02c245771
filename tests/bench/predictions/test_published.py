"""Predicted speeds beside published ones, through the real compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qtuning_fast.bench.predictions.cost_model import Prediction
from qtuning_fast.bench.predictions.published import HIDDEN, PUBLISHED, Comparison
from qtuning_fast.kernels.blocks import blocks_for

ROOT = Path(__file__).parents[3]
WITHIN = 0.25  # of published speeds: what docs say of the model


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


@pytest.mark.thorough
def test_published_speeds():
    code = START + "print(json.dumps([[str(one.published), one.error] for one in published.comparisons()]))"
    errors = dict(json.loads(in_a_process(code)))
    assert len(errors) >= 4
    assert {name: error for name, error in errors.items() if abs(error) > WITHIN} == {}


def test_a_speed_is_work_over_time():
    one = PUBLISHED[0]
    took = 4 * one.B * one.heads * one.N**2 * one.D / (one.teraflops * 1e12) * 1e6  # microseconds
    prediction = Prediction(took / 2, "tensor", {}, 0, 0, 0, 1, 1, 0, 0)
    comparison = Comparison(one, blocks_for("sm_90", 2, one.D, "forward"), prediction)
    assert comparison.error == pytest.approx(1.0)  # twice as fast
    assert all(each.heads * each.D == HIDDEN or "triton" in each.source for each in PUBLISHED)
