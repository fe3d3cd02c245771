"""Whole models: rows differ in nothing but attention, what is wrong is not timed, a run ends in a file and tables."""

import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qtuning_fast.attention import dispatch, reference
from qtuning_fast.bench.rows import command, models
from qtuning_fast.bench.rows.models import (
    MODELS,
    OURS,
    TINY,
    VIT,
    WAYS,
    WAYS_ON_CPU,
    Training,
    by_peer,
    measure,
    random_batch,
    sizes,
)


def by_definition(call):
    return reference.attend(call)[0]


def not_here(call):
    raise RuntimeError("a compiler found something") from NotImplementedError("no backward pass on a CPU\nand more")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    for module in (models, command):
        monkeypatch.setattr(module, "in_a_process", lambda function, *arguments: function(*arguments))
    for name, attend in (("eager", by_definition), ("flex", not_here)):
        monkeypatch.setitem(models.PEERS, name, SimpleNamespace(attend=attend))


def training(name, way=OURS):
    return Training(WAYS[way].prepare(MODELS[name], "cpu"), random_batch(MODELS[name], "cpu"))


def test_a_dry_run_ends_in_a_file_and_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "peak_on_cpu", lambda name, way: 3 << 20)
    out = tmp_path / "new" / "models.json"
    assert models.main(["--dry-run", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["question"] == "models" and list(document["entries"]) == [model.name for model in TINY]
    for model in TINY:
        entry = document["entries"][model.name]
        rows = entry["rows"]
        assert list(rows) == [way for way in WAYS_ON_CPU if model.family in WAYS[way].families]
        assert rows["flex"]["error"] == "NotImplementedError: no backward pass on a CPU" and not rows["flex"]["timing"]
        assert rows["eager"]["difference"] < 1e-4
        assert model.family is VIT or rows["peft"]["difference"] is None  # peft has no prefix for images
        for way in rows.keys() - {"flex", "peft"}:
            row = rows[way]
            assert not row["error"] and row["timing"]["rounds"] == models.DRY_ROUNDS and row["peak_bytes"] == 3 << 20
            speed = entry["tokens_per_step"] / row["timing"]["median"] * 1e3
            assert row["tokens_per_second"] == pytest.approx(speed, abs=0.1)
        assert rows["frozen-base"]["trainable_parameters"] == entry["sizes"]["hidden"]
        assert rows["eager"]["trainable_parameters"] == rows[OURS]["trainable_parameters"]
    text = capsys.readouterr().out
    assert "t5-tiny" in text and "no backward pass" in text and max(map(len, text.splitlines())) <= 120


def without_gate(call):
    return by_definition(replace(call, gate=None))


def without_a_gradient(call):
    """But for the loss all is NaN."""
    output = by_definition(call)
    output.register_hook(lambda d_output: d_output * torch.nan)
    return output


@pytest.mark.parametrize("attend", [without_gate, without_a_gradient])
def test_a_peer_that_is_wrong_is_not_timed(attend, monkeypatch):
    monkeypatch.setitem(models.PEERS, "eager", SimpleNamespace(attend=attend))
    rows = measure("llama-tiny", ["eager", OURS], "cpu", 1)["rows"]
    assert rows["eager"]["error"].startswith("wrong: ") and rows["eager"]["timing"] is None
    assert rows["eager"]["difference"] > 0.1 and not rows[OURS]["error"] and rows[OURS]["timing"]


@pytest.mark.parametrize("name", [model.name for model in TINY])
def test_a_peer_computes_each_layer_with_a_prefix_and_is_gone_afterwards(name, monkeypatch):
    calls = []
    monkeypatch.setitem(models.PEERS, "eager", SimpleNamespace(attend=lambda c: calls.append(c) or by_definition(c)))
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    choose, known, trained = dispatch.choose, dict(dispatch.BACKENDS), training(name)
    trained.step(WAYS["eager"])
    assert len(calls) == 2  # T5's decoder has no prefix
    assert {call.prefix_key.shape[-2] for call in calls} == {MODELS[name].rows}  # a queue that is full
    assert dispatch.choose is choose and dispatch.BACKENDS == known
    assert os.environ[dispatch.ENVIRONMENT_VARIABLE] == "reference"
    trained.step(WAYS[OURS])
    assert len(calls) == 2


def test_a_peer_that_fails_is_gone_too():
    choose, known = dispatch.choose, dict(dispatch.BACKENDS)
    with pytest.raises(RuntimeError, match="a compiler"):
        training("bert-tiny").step(WAYS["flex"])
    assert dispatch.choose is choose and dispatch.BACKENDS == known


def test_gradients_pass_through_a_peer_to_the_gate():
    trained = training("bert-tiny")
    with by_peer("eager"):
        trained.module(**trained.batch).loss.backward()
    assert all(parameter.grad.abs() > 0 for parameter in trained.module.parameter_groups()["gate"])


def test_without_peft_its_row_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = measure("bert-tiny", ["peft", OURS], "cpu", 1)["rows"]
    assert "peft" in rows["peft"]["error"] and rows["peft"]["timing"] is None and rows[OURS]["timing"]


@pytest.mark.parametrize("name", [model.name for model in TINY if model.family is not VIT])
def test_a_prefix_of_peft_trains_in_each_family_or_its_row_says_what_it_needs(name):
    pytest.importorskip("peft")
    row = measure(name, ["peft"], "cpu", 1)["rows"]["peft"]
    if row["error"]:  # whether peft works with this transformers, tests/integrations/test_peft.py says
        assert row["error"].startswith("RuntimeError: needs peft with a transformers that it works with, not ")
        assert row["timing"] is None and "past key values" in row["error"]
        return
    assert not row["error"] and row["timing"] and row["trainable_parameters"] >= 2 * MODELS[name].rows * 2 * 32


@pytest.mark.parametrize("name", [model.name for model in TINY])
def test_the_lower_bound_trains_as_far_down_as_the_lowest_attention(name):
    trained = training(name, "frozen-base")
    inputs = []
    lowest = trained.module.base_model.get_submodule(MODELS[name].family.lowest_attention)
    lowest.register_forward_pre_hook(lambda _, x, named: inputs.extend([*x, *named.values()]), with_kwargs=True)
    trained.module(**trained.batch).loss.backward()
    assert trained.module.offset.grad.abs().sum() > 0
    assert any(isinstance(x, torch.Tensor) for x in inputs)
    assert not any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def test_the_peak_counts_what_is_taken_and_given_back(monkeypatch):
    def greedy(call):
        return by_definition(call) + torch.ones(32 << 20).sum() * 0

    monkeypatch.setitem(models.PEERS, "eager", SimpleNamespace(attend=greedy))
    modest = models.peak_on_cpu("bert-tiny", OURS)
    if modest is None:
        pytest.skip("no /proc/self/clear_refs")
    assert models.peak_on_cpu("bert-tiny", "eager") > 100 << 20 > modest


def test_every_row_learns():
    for way in (OURS, "eager", "qtuning_fast-no-gate", "frozen-base"):
        trained = training("bert-tiny", way)
        before = [parameter.detach().clone() for parameter in trained.trained]
        trained.step(WAYS[way])
        assert any(not torch.equal(x, y) for x, y in zip(trained.trained, before)), way


@pytest.mark.parametrize(("name", "millions"), [("bert-base", 109.5), ("t5-base", 222.9), ("llama-1b", 1235.8)])
def test_models_are_as_large_as_what_they_stand_for(name, millions):
    assert sizes(MODELS[name])["parameters"] / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.gpu
def test_steps_are_timed_and_their_memory_is_counted_on_a_gpu():
    for way, row in measure("llama-tiny", [OURS, "composed", "eager", "frozen-base"], "cuda", 2)["rows"].items():
        assert not row["error"] and row["timing"] and row["peak_bytes"] > 0, way
