"""The table of block sizes."""

from dataclasses import replace
from itertools import product

import pytest
import triton

from qtuning_fast.kernels import blocks
from qtuning_fast.kernels.blocks import DEFAULT, DIRECTIONS, blocks_for, instead, table, write

TARGETS = (DEFAULT, "sm_80", "sm_90", "sm_100", "gfx942", "interpreter")


@pytest.mark.parametrize("target", [*TARGETS, "sm_75"])
def test_every_call_finds_an_entry(target):
    for element_size, head_size, direction in product((2, 4), (16, 32, 64, 128, 256), DIRECTIONS):
        entry = blocks_for(target, element_size, head_size, direction)
        assert entry.target == (target if target in TARGETS else DEFAULT)
        assert entry.element_size == element_size and entry.direction == direction and entry.head_size >= head_size


def test_the_smallest_head_size_that_holds_it_is_taken():
    assert blocks_for("sm_90", 2, 16, "forward").head_size == 32
    assert blocks_for("sm_90", 2, 64, "forward").head_size == 64
    with pytest.raises(KeyError, match="head size 512"):
        blocks_for("sm_90", 2, 512, "forward")


def test_blocks_are_what_kernels_take():
    seen = set()
    for entry in table():
        key = (entry.target, entry.element_size, entry.head_size, entry.direction)
        assert key not in seen and not seen.add(key)
        of_prefix = entry.direction in ("merge", "prefix-queries")
        no_keys = of_prefix or (entry.direction == "whole" and entry.keys == 0)  # where it is off
        assert not of_prefix or entry.keys == 0
        for size in (entry.queries, *([] if no_keys else [entry.keys]), entry.prefix):
            assert 16 <= size <= 256 and triton.next_power_of_2(size) == size
        assert entry.warps in (1, 2, 4, 8, 16) and 1 <= entry.stages <= 5 and entry.direction in DIRECTIONS


def test_other_blocks_for_a_trial():
    before = blocks_for("sm_90", 2, 64, "keys")
    trial = replace(before, queries=16)
    with instead(trial):
        assert blocks_for("sm_90", 2, 64, "keys") == trial
        assert blocks_for("sm_90", 2, 64, "forward") == blocks_for("sm_90", 2, 64, "forward")
    assert blocks_for("sm_90", 2, 64, "keys") == before


def test_what_is_written_is_read_again(tmp_path, monkeypatch):
    entries = table()
    text = blocks.PATH.read_text()
    monkeypatch.setattr(blocks, "PATH", tmp_path / "blocks.json")
    write(entries[::-1])
    assert (tmp_path / "blocks.json").read_text() == text  # the order is fixed: a rewrite shows what changed
    tuned = replace(blocks_for("sm_90", 2, 64, "keys"), queries=128, measured="a GPU")
    write([tuned if entry == blocks_for("sm_90", 2, 64, "keys") else entry for entry in entries])
    assert blocks_for("sm_90", 2, 64, "keys") == tuned
    monkeypatch.undo()
    table.cache_clear()
    blocks._from_table.cache_clear()
