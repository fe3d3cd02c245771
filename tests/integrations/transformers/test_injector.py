"""The switch between a model's own attention and ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    CTRLConfig,
    CTRLLMHeadModel,
    EsmConfig,
    FalconH1Config,
    LayoutLMConfig,
    YolosConfig,
)

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.integrations.transformers import PrefixInjector
from qtuning_fast.method.prefix import Prefix

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


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(TypeError, match="base_model"):
        QTuningModel(torch.nn.Linear(2, 2), QTuningConfig())  # type: ignore[arg-type]


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


def test_a_model_is_attached_to_once_and_given_back(families: Any) -> None:
    base = families["BERT"].base_model().train()
    before = base.config._attn_implementation
    injector = PrefixInjector(base)
    assert base.config._attn_implementation == before and not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())
    with pytest.raises(ValueError, match="attached already"):
        PrefixInjector(base)
    injector.detach()
    assert base.training and all(parameter.requires_grad for parameter in base.parameters())
    PrefixInjector(base)


def test_what_stood_on_the_layers_stands_there_after_the_block(families: Any) -> None:
    base, ids = families["BERT"].base_model(), torch.arange(5, 12)[None]
    injector = PrefixInjector(base)
    plain = base(input_ids=ids).last_hidden_state
    rows = [{"prefix_key": torch.ones(4, 2, 8), "prefix_value": torch.ones(4, 2, 8), "gate": None}]
    with injector.keeping():
        injector.switch()
        injector.place([1], Prefix(rows))  # type: ignore[arg-type]
        assert injector.placed is not None
        with_prefix = base(input_ids=ids).last_hidden_state
        with injector.keeping():
            injector.restore()
            assert torch.equal(base(input_ids=ids).last_hidden_state, plain)
        assert torch.equal(base(input_ids=ids).last_hidden_state, with_prefix)
    assert injector.placed is None and torch.equal(base(input_ids=ids).last_hidden_state, plain)
    assert not torch.allclose(with_prefix, plain)


def test_whether_gradients_pass_is_tried_and_leaves_no_trace(families: Any) -> None:
    base = families["BERT"].base_model()
    injector = PrefixInjector(base)
    assert injector.passes_gradient([0, 1])
    base.encoder.layer[1].register_forward_hook(lambda module, args, output: output.detach())
    assert not injector.passes_gradient([0]) and injector.placed is None
