"""Peers that cannot be compiled without a GPU are put together from parts."""

from types import SimpleNamespace

import pytest

from qtuning_fast.bench.predictions import predict, ratios
from qtuning_fast.bench.predictions.cost_model import H100
from qtuning_fast.bench.shapes import VIT_B16


def test_ratios_are_those_of_the_parts(monkeypatch):
    """A peer's step is attention alone, putting the prefix in front, and with FlexAttention the gate on every score."""

    def step(shape, device):
        assert shape.P or shape.M == VIT_B16.M + VIT_B16.P
        return [("all", SimpleNamespace(microseconds=100.0 if shape.P else 80.0))]

    monkeypatch.setattr(predict, "step", step)
    monkeypatch.setattr(predict, "HEADLINES", (VIT_B16,))
    (row,) = ratios.rows(H100)
    sdpa, flex = row["parts"]["sdpa"], row["parts"]["flex-frozen-gate"]
    assert sdpa["attention"] == flex["attention"] == 80.0 and sdpa["gate"] == 0.0 < flex["gate"]
    assert sdpa["concat"] > flex["concat"] > 0  # the compiler fuses what PyTorch launches one by one
    assert row["ratios"]["fused / sdpa"] == pytest.approx(100.0 / sum(sdpa.values()))
    assert row["ratios"]["flex-frozen-gate / fused"] == pytest.approx(sum(flex.values()) / 100.0)
