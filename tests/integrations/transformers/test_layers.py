"""Which layers of a model can take a prefix, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    CLIPConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    NllbMoeConfig,
)

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.integrations.transformers import NAME, layers
from qtuning_fast.integrations.transformers.layers import configs_of, dummy_inputs, find_layers
from qtuning_fast.method.prompts import LayerShape

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
STACKS = {
    **{f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))},
    **{"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}


@pytest.mark.parametrize("name", ["DeBERTa", "Falcon", "ALBERT", "wav2vec 2.0"])
def test_models_that_cannot_take_a_prefix_are_refused_and_left_as_they_were(name: str, refused: Any) -> None:
    config, reason = refused[name]
    base = AutoModel.from_config(config)
    before = base.config._attn_implementation, base.training, [p.requires_grad for p in base.parameters()]
    with pytest.raises(NotImplementedError, match=f"{type(base).__name__}.*{reason}"):
        QTuningModel(base, QTuningConfig())
    assert (base.config._attn_implementation, base.training, [p.requires_grad for p in base.parameters()]) == before


def test_sinks_of_each_token_are_refused() -> None:
    if not hasattr(transformers, "Inkling2TextConfig"):
        pytest.skip("this transformers does not have the family yet")
    config = transformers.Inkling2TextConfig(
        **SIZES, **WORDS, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16
    )
    with pytest.raises(NotImplementedError, match="attention sinks"):
        QTuningModel(AutoModel.from_config(config), QTuningConfig())


def test_experts_that_read_the_mask_of_eager_attention_are_refused() -> None:
    model = AutoModelForSeq2SeqLM.from_config(NllbMoeConfig(**STACKS, **WORDS, num_experts=4))
    with pytest.raises(NotImplementedError, match="experts"):
        QTuningModel(model, QTuningConfig(task_type="text-to-text"))


def test_models_whose_config_is_not_of_one_stack_of_text_are_refused() -> None:
    text = {**SIZES, "vocab_size": 40, "eos_token_id": 3}
    clip = CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 16, "patch_size": 8})
    llava = LlavaConfig(
        text_config=LlamaConfig(**SIZES, vocab_size=40),
        vision_config=CLIPVisionConfig(**SIZES, image_size=16, patch_size=8),
    )
    bloom = BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)  # computes attention itself
    for config in (clip, llava, bloom):
        with pytest.raises(NotImplementedError):
            QTuningModel(AutoModel.from_config(config), QTuningConfig())


def test_layers_are_found_in_the_order_in_which_they_run(family: Any) -> None:
    model = family.base_model()
    for config in configs_of(model):
        config._attn_implementation = NAME
    before = [module.training for module in model.train().modules()]
    found = find_layers(model)
    assert [module.training for module in model.modules()] == before
    expected = {"encoder-decoder": 5 if family.name == "BART" else 4}.get(family.kind, 2)
    assert len({id(layer.module) for layer in found}) == len(found) == expected
    stacks = [layer.stack for layer in found]
    if family.kind == "encoder-decoder":
        assert stacks == sorted(stacks, reverse=True) and set(stacks) == {"encoder", "decoder"}
    else:
        assert set(stacks) == {"decoder" if family.kind == "decoder" else "encoder"}
    assert all(layer.is_causal == (layer.stack == "decoder") for layer in found)
    grouped = getattr(family.config, "num_key_value_heads", None) or 4
    assert all(layer.shape == LayerShape(4, grouped, 8, 8) for layer in found)


def test_a_layer_beside_the_interface_is_counted_and_refused(families: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families["BERT"].base_model()
    calls = layers._calls_of
    monkeypatch.setattr(layers, "_calls_of", lambda model: calls(model)[:1])
    model.set_attn_implementation(NAME)
    with pytest.raises(
        NotImplementedError, match="BertModel: 1 of the 2 layers of its model call transformers' attent"
    ):
        find_layers(model)


@pytest.mark.parametrize("name", ["BERT", "ViT", "T5"])
def test_dummy_inputs_are_what_the_model_takes(families: Any, name: str) -> None:
    model = families[name].base_model()
    inputs = dummy_inputs(model)
    assert (
        set(inputs) == {"ViT": {"pixel_values"}, "BERT": {"input_ids"}, "T5": {"input_ids", "decoder_input_ids"}}[name]
    )
    if name != "ViT":
        assert not (inputs["input_ids"] == model.config.pad_token_id).any()
    model(**inputs)


def test_every_config_that_is_read_is_known_once(families: Any) -> None:
    model = families["T5"].base_model()
    configs = configs_of(model)
    assert configs[0] is model.config and len({id(config) for config in configs}) == len(configs) == 3
