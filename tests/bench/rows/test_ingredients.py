"""An ingredient is left out of a step, and nothing else is."""

import torch

from qtuning_fast.bench.measure import QUICK, measure_cases
from qtuning_fast.bench.rows.ingredients import cases
from qtuning_fast.bench.shapes import TINY

TURNS = QUICK._replace(rounds=2)


def test_ingredients_are_left_out_one_by_one():
    rows = measure_cases(cases(TINY, "composed"), "cpu", torch.float32, TURNS)
    assert not any(row.error for row in rows.values())
    gradients = {name: set(row.errors) for name, row in rows.items()}
    assert gradients["all"] - gradients["without gate"] == {"gate_alpha", "gate_tau"}
    assert gradients["all"] - gradients["without reweighting"] == {"U_key", "V_key", "U_value", "V_value"}
    shapes = {name: shape for name, (shape, _) in cases(TINY, "composed").items()}
    assert shapes["all"].tasks > 1 == shapes["without bank"].tasks and shapes["without bank"].padding
    assert shapes["all"].padding > 0 == shapes["without padding"].padding
