"""How often loops run is read from the kernels' own source."""

from dataclasses import replace

import pytest
import torch

from qtuning_fast.bench.predictions.loop_counts import LoopCountError, loop_counts
from qtuning_fast.bench.predictions.predict import launches
from qtuning_fast.bench.shapes import TINY, TINY_CAUSAL, TINY_MIXED
from qtuning_fast.kernels.blocks import blocks_for, instead

BLOCKS = replace(blocks_for("interpreter", 2, 16, "forward"), queries=16, keys=16, prefix=16)


def found(shape, kernel="forward", **changes):
    """Of each kind of program how many there are, and how often the loops of the kernel's own file run."""
    entry = replace(BLOCKS, direction=kernel, **changes)
    with instead(entry):
        launch = dict(launches(shape))[kernel]
    programs = loop_counts(launch)
    counts = torch.bincount(torch.from_numpy(programs.order), minlength=len(programs.kinds)).tolist()
    assert len(programs.order) == launch.programs
    kinds = [[kind[place] for place in sorted(kind)] for kind in programs.kinds]
    return sorted(zip(kinds, counts))


def test_loops_over_prefix_and_context():
    shape = replace(TINY, N=40, P=20)  # 3 tiles of queries, 2 of them of the prefix, 2 whole ones of keys and a part
    assert found(shape) == [([2, 2, 1], shape.B * shape.Hq * 3)]


def test_with_causality_programs_differ():
    shape = replace(TINY_CAUSAL, N=32, P=16)
    heads = shape.B * shape.Hq
    assert found(shape) == [([1, 0, 1], heads), ([1, 1, 1], heads)]


def test_programs_of_two_kinds_in_one_launch():
    shape = replace(TINY, N=32, P=16)  # 2 tiles of keys a head, each walks over 2 tiles of queries
    with instead(replace(BLOCKS, direction="keys")):
        launch = dict(launches(shape))["keys"]
    programs = loop_counts(launch)
    files = [sorted({(place.line, times) for place, times in kind.items()}) for kind in programs.kinds]
    assert len(files) == 2 and files[0][0][0] != files[1][0][0]  # loops of their own
    of_context = programs.order[launch.arguments["prefix_programs"] :]
    assert len(of_context) == shape.B * shape.Hkv * 2 and len(set(of_context.tolist())) == 1
    assert set(programs.kinds[of_context[0]].values()) == {2}


def test_what_depends_on_data_is_refused_by_its_place():
    launch = dict(launches(replace(TINY_MIXED, N=32)))["keys"]
    with pytest.raises(LoopCountError, match=r"backward_keys\.py:\d+"):
        loop_counts(launch)
