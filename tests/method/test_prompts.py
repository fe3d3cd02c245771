"""The rows of a prefix: of a layer, and in front of the input."""

from typing import Any

import pytest
import torch

from qtuning_fast import prefix_attention
from qtuning_fast.method.gate import Gate
from qtuning_fast.method.prompts import InputPrompt, LayerPrefix, LayerShape

SHAPE = LayerShape(num_heads=4, num_kv_heads=2, key_size=3, value_size=5)


def test_rows_go_to_heads_and_back() -> None:
    rows = torch.randn(7, SHAPE.row_features)
    key, value = SHAPE.from_rows(rows)
    assert key.shape == (2, 7, 3) and value.shape == (2, 7, 5)
    assert torch.equal(SHAPE.to_rows(key, value), rows)


@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("per_head", [True, False])
def test_folded_prefix_is_the_live_one(rank: int | None, per_head: bool) -> None:
    torch.manual_seed(0)
    prefix = LayerPrefix(SHAPE, shared_length=2, rank=rank)
    gate = Gate("tanh", SHAPE.num_heads if per_head else None)
    prefix.begin(prefix.new_rows(3), torch.randn(4, SHAPE.row_features), torch.rand(4))
    for parameter in (*prefix.parameters(), *gate.parameters()):
        torch.nn.init.normal_(parameter)
    query, key, value = torch.randn(2, 4, 6, 3), torch.randn(2, 2, 5, 3), torch.randn(2, 2, 5, 5)
    live = prefix_attention(query, key, value, **prefix.arguments(prefix.prompt), **gate.arguments())
    folded_key, folded_value = prefix.folded()
    assert folded_key.shape[1] == 2 + 3 + 4
    folded = prefix_attention(query, key, value, folded_key, folded_value, **gate.arguments())
    torch.testing.assert_close(live, folded)


def test_old_rows_are_frozen_and_new_ones_start_as_the_method_says() -> None:
    torch.manual_seed(0)
    wide = LayerShape(num_heads=8, num_kv_heads=8, key_size=64, value_size=64)
    prefix = LayerPrefix(wide, shared_length=10, rank=1)
    prefix.begin(prefix.new_rows(10), torch.randn(4, wide.row_features), torch.ones(4))
    key, value = wide.from_rows(prefix.prompt)
    assert key.std().item() == pytest.approx(0.5, rel=0.05) and value.std().item() == pytest.approx(0.02, rel=0.05)
    assert not prefix.old.requires_grad and prefix.prompt.requires_grad


@pytest.mark.parametrize("in_input", [True, False])
def test_rows_may_be_uniform(in_input: bool) -> None:
    torch.manual_seed(0)
    more: dict[str, Any] = {"shared_length": 2, "rank": None, "uniform": True}
    prompt = InputPrompt(torch.nn.Embedding(9, 400), 400, **more) if in_input else LayerPrefix(SHAPE, **more)
    for drawn in (prompt.new_rows(500), prompt.shared if in_input else prompt.new_rows(500)):
        assert -1 <= drawn.min() < -0.9 and 0.9 < drawn.max() <= 1 and abs(drawn.mean()) < 0.1
        assert drawn.std().item() == pytest.approx(3**-0.5, rel=0.1)


def test_without_reweighting_old_rows_keep_their_scale() -> None:
    torch.manual_seed(0)
    old, scale = torch.randn(4, SHAPE.row_features), torch.rand(4)
    layer = LayerPrefix(SHAPE, shared_length=0, rank=None)
    layer.begin(layer.new_rows(3), old, scale)
    assert [name for name, _ in layer.named_parameters()] == ["shared", "prompt"]
    arguments = layer.arguments(layer.prompt)
    assert "reweight_key" not in arguments
    rows = SHAPE.to_rows(arguments["prefix_key"], arguments["prefix_value"])
    torch.testing.assert_close(rows, torch.cat([layer.prompt, scale[:, None] * old]))
    torch.testing.assert_close(layer.row_weights() * old, scale[:, None] * old)


@pytest.mark.parametrize("rank", [1, 2, None])
def test_embeddings_start_as_words_and_old_ones_are_reweighted(rank: int | None) -> None:
    torch.manual_seed(0)
    words = torch.nn.Embedding(30, 8)
    prompt = InputPrompt(words, 8, shared_length=2, rank=rank)
    old, scale = torch.randn(4, 8), torch.rand(4)
    prompt.begin(prompt.new_rows(3), old, scale)
    new = torch.cat([prompt.shared, prompt.prompt])
    assert all((words.weight == row).all(1).any() for row in new)
    torch.testing.assert_close(prompt.embeddings(prompt.prompt), torch.cat([new, scale[:, None] * old]))
    assert not any(parameter is words.weight for parameter in prompt.parameters())
    without_words = InputPrompt(None, 64, shared_length=200, rank=rank)
    assert without_words.shared.std().item() == pytest.approx(0.02, rel=0.05)
