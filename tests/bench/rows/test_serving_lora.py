"""The peer: each task has an adapter and a head of its own, and gets the same answer whatever came before."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

from qtuning_fast.bench.rows.serving_lora import LoraModel


def test_switching_changes_the_answer_and_changes_it_back(tiny_model_folder):
    model = LoraModel(str(tiny_model_folder), 3)
    first = model.answer("the red cat", "task-0000")
    other = model.answer("the red cat", "task-0002")
    assert first["outputs"] != other["outputs"] and first["task"] == "task-0000"
    assert model.answer("the red cat", "task-0000") == first
    assert sum(first["outputs"].values()) == pytest.approx(1)
