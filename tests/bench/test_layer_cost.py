"""Whose attention `qtuning-fast bench` measures, and what it says of the result."""

from dataclasses import replace

import pytest
import torch
import transformers

from qtuning_fast.bench import layer_cost
from qtuning_fast.bench.layer_cost import FULL_QUEUE, LayerCase, LayerOptions
from qtuning_fast.bench.shapes import SHAPES

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8}
CONFIGS = {  # Hq, Hkv, D, causal, bias
    "BertConfig": (SMALL, (8, 8, 8, False, False)),
    "ViTConfig": (SMALL, (8, 8, 8, False, False)),
    "LlamaConfig": (SMALL | {"num_key_value_heads": 2}, (8, 2, 8, True, False)),
    "Qwen3Config": (SMALL | {"num_key_value_heads": 2, "head_dim": 16}, (8, 2, 16, True, False)),
    "GPT2Config": ({"n_embd": 64, "n_head": 4}, (4, 4, 16, True, False)),
    "T5Config": ({"d_model": 64, "d_kv": 32, "num_heads": 4}, (4, 4, 32, False, True)),
    "BartConfig": ({"d_model": 64, "encoder_attention_heads": 4}, (4, 4, 16, False, False)),
    "MarianConfig": ({"d_model": 64, "encoder_attention_heads": 4}, (4, 4, 16, False, False)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_and_masks_are_read_from_a_models_configuration(name, tmp_path):
    settings, expected = CONFIGS[name]
    getattr(transformers, name)(**settings).save_pretrained(tmp_path / "mine")
    shape = LayerOptions(model=str(tmp_path / "mine")).as_shape()
    assert (shape.Hq, shape.Hkv, shape.D, shape.is_causal, shape.bias) == expected
    assert shape.name == "mine" and shape.P == FULL_QUEUE == 60 and shape.trained


def test_a_model_without_attention_is_refused(tmp_path):
    transformers.ResNetConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no heads"):
        LayerOptions(model=str(tmp_path)).as_shape()


def test_what_is_said_overrides_a_shape_of_the_registry():
    llama = SHAPES["llama-8b"]
    assert LayerOptions(shape="llama-8b").as_shape() == llama
    wanted = LayerOptions(shape="llama-8b", batch=2, tokens=7, prefix_rows=3, tasks=2, padding=0.1, causal=False)
    assert wanted.as_shape() == replace(llama, B=2, N=7, P=3, tasks=2, padding=0.1, is_causal=False)
    decoding = LayerOptions(shape="llama-8b", decode=True).as_shape()
    assert (decoding.N, decoding.M, decoding.trained) == (1, llama.M, False)
    assert LayerOptions(heads=2, head_size=8, decode=True, context=9).as_shape().M == 9


def test_what_auto_takes_is_measured_asked_for_or_not(monkeypatch):
    tiny = LayerOptions(shape="tiny-padded")
    monkeypatch.setenv("QTUNING_FAST_BACKEND", "reference")
    case = LayerCase.of(tiny, peers=["sdpa", "eager"])
    assert case.peers == ["reference", "sdpa", "eager"] and "QTUNING_FAST_BACKEND" in case.choice.reason
    monkeypatch.delenv("QTUNING_FAST_BACKEND")
    assert LayerCase.of(tiny).choice.backend in LayerCase.of(tiny).peers


def test_what_would_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = LayerOptions(
        heads=12, head_size=32, batch=64, tokens=512
    )  # its scores: 0.8 GiB in float32, of which eager has 5
    monkeypatch.setattr(layer_cost, "_free_bytes", lambda device: 20 << 30)
    LayerCase.of(wanted)
    monkeypatch.setattr(layer_cost, "_free_bytes", lambda device: 3 << 30)
    with pytest.raises(ValueError, match=r"--tokens 512.* would take about .* GiB, and 3 are free"):
        LayerCase.of(wanted)
    monkeypatch.setattr(layer_cost, "LARGEST_REFERENCE", 1)
    with pytest.raises(ValueError, match="--peer eager would take"):
        LayerCase.of(wanted)
    LayerCase.of(wanted, peers=["sdpa"])
