"""Which blocks are tried, and which are dropped for what the compiler says of them."""

import pytest
import torch

from qtuning_fast.bench.plans import candidates as candidates_module
from qtuning_fast.bench.plans import tune
from qtuning_fast.bench.plans.candidates import candidates, obstacle
from qtuning_fast.bench.plans.tune import Job, incumbent_of
from qtuning_fast.bench.shapes import Shape
from qtuning_fast.kernels.blocks import DIRECTIONS, Blocks

SMALL = Shape("small", B=1, Hq=2, Hkv=1, N=20, D=16, P=12, is_causal=True)


def entry(**changes) -> Blocks:
    sizes = {"queries": 64, "keys": 64, "prefix": 64, "warps": 4, "stages": 2}
    return Blocks(**({"target": "sm_90", "element_size": 2, "head_size": 64, "direction": "forward"} | sizes | changes))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", tune.DTYPES)
@pytest.mark.parametrize("head_size", tune.SHAPES)
def test_candidates_begin_with_the_incumbent_and_are_all_different(dtype, head_size, direction):
    incumbent = incumbent_of("sm_90", Job(dtype, head_size, direction))
    found = candidates(incumbent)
    assert found[0] == incumbent and len(set(found)) == len(found) and 5 <= len(found) <= 40
    assert {(e.target, e.element_size, e.head_size, e.direction) for e in found} == {
        ("sm_90", tune.DTYPES[dtype].itemsize, head_size, direction)
    }


def test_the_tile_of_a_program_is_one_of_keys_in_the_direction_of_keys(monkeypatch):
    monkeypatch.setattr(candidates_module, "TILES_OF_KEYS", candidates_module.TILES)
    forward, keys = (candidates(entry(direction=d))[1:] for d in ("forward", "keys"))
    assert {(e.queries, e.keys) for e in forward} == {(e.keys, e.queries) for e in keys}


def test_what_spills_or_does_not_fit_is_not_run():
    fine = {"registers": 255, "spilled": 0, "shared": 227 * 1024}
    assert obstacle(entry(), fine, fine) == ""
    assert obstacle(entry(), fine | {"spilled": 8}, fine) == "spills 8 bytes"
    assert obstacle(entry(), fine | {"spilled": 8}, fine | {"spilled": 8}) == ""
    assert obstacle(entry(head_size=256), fine | {"spilled": 8}, fine) == ""
    assert obstacle(entry(element_size=4), fine | {"spilled": 1000}, fine) == "spills 1000 bytes"
    assert "shared memory" in obstacle(entry(), fine | {"shared": 227 * 1024 + 1}, fine)
    assert obstacle(entry(), {"error": "CompilationError: no"}, fine) == "CompilationError: no"


def test_what_the_compiler_raises_is_an_obstacle(monkeypatch):
    monkeypatch.setattr(candidates_module.triton.runtime.driver, "set_active", lambda driver: None)
    monkeypatch.setattr(candidates_module, "AbsentDriver", lambda target: None)
    monkeypatch.setattr(candidates_module.shapes, "inputs", lambda *args, **kwargs: 1 / 0)
    found = candidates_module.compile_for("sm_90", torch.bfloat16, entry(), (SMALL,))
    assert found == {"error": "ZeroDivisionError: division by zero"}
