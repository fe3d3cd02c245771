"""Peers are compared with float64, and who is wrong is called so."""

import math

import pytest
import torch

from qtuning_fast.bench import accuracy
from qtuning_fast.bench.accuracy import WRONG, Reference, check, verdict
from qtuning_fast.bench.peers import PEERS
from qtuning_fast.bench.shapes import SHAPES, TINY, inputs


def test_gradients_beyond_the_samples_compared_must_be_zero(monkeypatch):
    monkeypatch.setattr(accuracy, "LARGEST_REFERENCE", TINY.Hq * TINY.N * (TINY.P + TINY.M))  # one sample
    reference = Reference(TINY, inputs(TINY, dtype=torch.float32, device="cpu"))
    _, gradients = reference.of(PEERS["eager"])
    assert reference.samples.tolist() == [0] and gradients["query"].shape[0] == 1
    whole = torch.zeros(TINY.B, TINY.Hq, TINY.N, TINY.D)
    whole[:1] = gradients["query"]
    assert reference.error("query", whole, gradients["query"]) < 1e-5
    whole[-1] = 1.0
    assert reference.error("query", whole, gradients["query"]) > 1
    whole[-1] = math.nan
    assert reference.error("query", whole, gradients["query"]) == math.inf


def test_one_wrong_tile_is_seen():
    shape = SHAPES["bert-base-512-cpu"]
    reference = Reference(shape, inputs(shape, dtype=torch.float32, device="cpu"))
    expected, _ = reference.of(PEERS["eager"])
    x = expected.clone()
    x[0, 3, 64:128] = 0
    assert reference.error("output", x, expected) > 0.2 > WRONG[torch.bfloat16]


def test_what_should_be_nothing_counts_as_it_is():
    reference = Reference(TINY, inputs(TINY, dtype=torch.float32, device="cpu"))
    assert reference.error("U_key", torch.zeros(3), torch.zeros(3)) == 0.0
    assert reference.error("U_key", torch.full((4,), 0.5), torch.zeros(4)) == 1.0


@pytest.mark.parametrize(
    ("errors", "dtype", "said"),
    [
        ({"output": 1e-4, "key": 2e-4}, torch.float32, ""),
        ({"output": 1e-4, "key": 0.5}, torch.float32, "wrong: key is off by 0.5"),
        ({"output": 0.01}, torch.bfloat16, ""),
        ({"output": math.inf}, torch.bfloat16, "wrong: output is off by inf"),
        ({}, torch.float32, ""),
    ],
)
def test_a_verdict_names_the_worst(errors, dtype, said):
    assert verdict(errors, dtype) == said


@pytest.mark.parametrize("name", ["tiny-causal", "tiny-bias", "tiny-padded"])
def test_of_one_sample_that_is_too_long_the_last_queries_are_compared(name, monkeypatch):
    shape = SHAPES[name]
    monkeypatch.setattr(accuracy, "LARGEST_REFERENCE", 5 * shape.Hq * (shape.P + shape.M))
    reference = Reference(shape, inputs(shape, dtype=torch.float32, device="cpu"))
    assert reference.queries == 5 and len(reference.samples) == 1
    errors = {}
    check(PEERS["eager"], reference, errors, training=True)
    assert len(errors) == 12 and max(errors.values()) < 1e-5
    x = torch.ones(shape.B, shape.Hq, shape.N, shape.D)
    assert reference.error("query", x, reference.of(PEERS["eager"])[1]["query"]) > 1
