"""Families beside those of the table, and what happens when something goes wrong halfway."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BloomConfig,
    CLIPConfig,
    CLIPVisionConfig,
    CTRLConfig,
    CTRLLMHeadModel,
    EsmConfig,
    FalconH1Config,
    LayoutLMConfig,
    LlamaConfig,
    LlavaConfig,
    NllbMoeConfig,
    PixtralVisionConfig,
    PixtralVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    YolosConfig,
)

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1, "reparameterization": None}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
STACKS = {
    **{f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))},
    **{"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}
FALCON_H1 = {
    **{"num_key_value_heads": 2, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    **{"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16},
}


def test_sinks_by_another_name_are_refused() -> None:
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


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_an_error_while_a_task_is_set_leaves_the_one_before(families: Any, placement: str) -> None:
    """The prefix of a prompt is made by a pass through the model, which can fail, and adapters are read from disk."""
    family = families["Llama"]
    model, inputs = two_tasks(family, placement), family.batch()
    expected = model(**inputs).logits

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    handle = model.backbone.injector.layers[1].module.register_forward_pre_hook(fail)
    model.adapters.add(model.adapters.entry("first").info, file=Missing())  # type: ignore[arg-type]
    for act in (lambda: model.set_task("first"), lambda: model.generate(**inputs, max_new_tokens=2)):
        with pytest.raises(MemoryError):
            act()
    handle.remove()
    assert torch.equal(model(**inputs).logits, expected)
    model.set_task(None)
    base = model(**inputs).logits
    with pytest.raises(MemoryError):
        model.set_task("first")
    assert torch.equal(model(**inputs).logits, base)


class Missing:
    """An adapter's file that cannot be read."""

    def read(self, info: Any) -> None:
        raise MemoryError


def two_tasks(family: Any, placement: str, **changes: Any) -> QTuningModel:
    """Two finished tasks with prefixes at random; the second is set."""
    config = QTuningConfig(**(SMALL | {"placement": placement, "task_type": family.task_type} | changes))
    model = QTuningModel(family.base_model(), config)
    for name in ("first", "second"):
        model.start_task(name, 3)
        with torch.no_grad():
            for parameter in model.training_prefix.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.5)
        model.finish_task()
    return model.eval()


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


def test_models_that_scale_embeddings_in_place_leave_the_adapters_alone() -> None:
    torch.manual_seed(0)
    base = CTRLLMHeadModel(CTRLConfig(vocab_size=40, n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=30)).eval()
    model = QTuningModel(base, QTuningConfig(**SMALL, placement="input", task_type="causal-lm"))
    model.start_task("first")
    stored = model.finish_task().embeddings
    assert stored is not None
    before, ids = stored.clone(), torch.randint(5, 40, (2, 6))
    expected = model(input_ids=ids).logits
    model.set_task("first")
    assert torch.equal(stored, before)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_task_may_start_where_gradients_are_off(families: Any) -> None:
    family = families["BERT"]
    model = QTuningModel(family.base_model(), QTuningConfig(**SMALL))
    with torch.no_grad():
        model.start_task("first", 2)
    model.train()
    model(**family.batch(), labels=torch.tensor([0, 1, 1])).loss.backward()


@pytest.mark.parametrize(
    "config",
    [
        BartConfig(**STACKS, **WORDS),  # alone, its decoder takes no positions
        FalconH1Config(**SIZES, **WORDS, **FALCON_H1),  # a state passes beside attention
        EsmConfig(**SIZES, **WORDS, token_dropout=True, mask_token_id=4),  # embeddings are scaled where ids are given
        LayoutLMConfig(**SIZES, **WORDS),
        YolosConfig(**SIZES, image_size=[16, 16], patch_size=8, num_detection_tokens=3),
    ],
    ids=lambda config: config.model_type,
)
def test_models_in_front_of_which_a_prompt_is_another_are_refused(config: Any) -> None:
    kinds = {"bart": "causal-lm", "falcon_h1": "causal-lm", "yolos": "image-classification"}
    kind = kinds.get(config.model_type, "sequence-classification")
    base = (AutoModelForCausalLM if kind == "causal-lm" else AutoModel).from_config(config)
    with pytest.raises(NotImplementedError, match="cannot take a prompt in front"):
        QTuningModel(base, QTuningConfig(**SMALL, task_type=kind, placement="input"))
    QTuningModel(base, QTuningConfig(**SMALL, task_type=kind))


@pytest.mark.parametrize("placement", ["prefix", "input"])
def test_a_copy_of_a_model_with_a_task_set_is_a_model_of_its_own(families: Any, placement: str) -> None:
    for name in ("BERT", "GPT-2"):
        model, inputs = two_tasks(families[name], placement), families[name].batch()
        second = model(**inputs).logits
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**inputs).logits, second)
        copied.set_task("first")
        model.set_task("first")
        first = model(**inputs).logits
        model.set_task("second")
        assert torch.equal(copied(**inputs).logits, first)
        model.start_task("third", 3)
        model(**inputs, labels=inputs["input_ids"] if name == "GPT-2" else torch.tensor([0, 1, 2]))
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)


def test_models_that_share_a_config_go_their_own_ways(families: Any) -> None:
    family = families["BERT"]
    base, inputs = family.base_model(), family.batch()
    other = type(base)(base.config)
    before = base.config._attn_implementation
    models = [QTuningModel(each, QTuningConfig(**SMALL)) for each in (base, other)]
    for model in models:
        model.start_task("first", 2)
        model.finish_task()
    first, second = models
    first.set_task(None)
    expected = second(**inputs).logits
    first.set_task("first")
    first.set_task(None)
    assert torch.equal(second(**inputs).logits, expected)
    first.set_task("first")
    for model in models:
        model.detach()
    assert base.config._attn_implementation == before


def test_other_attention_chosen_under_a_task_is_not_computed_with_in_silence(families: Any) -> None:
    for name in ("BERT", "Llama"):
        model, inputs = two_tasks(families[name], "prefix"), families[name].batch()
        expected = model(**inputs).logits
        model.base_model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="attention is 'eager'"):
            model(**inputs)
        if name == "Llama":
            with pytest.raises(RuntimeError, match="attention is 'eager'"):
                model.generate(**inputs)
        model.set_task("second")
        assert torch.equal(model(**inputs).logits, expected)


def test_image_models_without_a_class_token_give_the_mean_of_their_patches() -> None:
    base = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=16, patch_size=8)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    hidden = base(pixel_values=pixels).last_hidden_state
    model = QTuningModel(base, QTuningConfig(**SMALL, task_type="image-classification"))
    pooled = model.features({"pixel_values": pixels}, task=None)
    torch.testing.assert_close(pooled, torch.nn.functional.rms_norm(hidden.mean(1), (32,)))


def test_image_models_that_pack_a_batch_into_one_sequence_are_refused() -> None:
    base = PixtralVisionModel(PixtralVisionConfig(**SIZES, head_dim=8, image_size=16, patch_size=8))
    model = QTuningModel(base, QTuningConfig(**SMALL, task_type="image-classification"))
    with pytest.raises(NotImplementedError, match="one sequence"):
        model.features({"pixel_values": torch.randn(3, 3, 16, 16)}, task=None)


def test_adapters_that_could_not_be_computed_with_or_read_again_are_refused(families: Any) -> None:
    model = two_tasks(families["BERT"], "prefix")
    adapter = dataclasses.replace(model.adapters["first"], name="third")
    for shift in (-1, 1.5, True):
        with pytest.raises(ValueError, match="position_shift is"):
            model.add_task(dataclasses.replace(adapter, position_shift=shift))
    for keys in ([key.long() for key in adapter.keys], [key.tolist() for key in adapter.keys]):
        with pytest.raises(TypeError, match=r"keys\.0 is"):
            model.add_task(dataclasses.replace(adapter, keys=tuple(keys)))
