"""The switch between a model's own attention and ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.integrations.transformers import NAME
from qtuning_fast.integrations.transformers.attention_switch import AttentionSwitch

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1, "reparameterization": None}


def test_a_shared_config_names_our_attention_until_the_last_switch_is_off(families: Any) -> None:
    base = families["BERT"].base_model()
    config, other = base.config, type(base)(base.config)
    before = config._attn_implementation
    first, second = AttentionSwitch(base), AttentionSwitch(other)
    first.on()
    first.on()
    second.on()
    first.off()
    assert config._attn_implementation == NAME and second.is_on and not first.is_on
    config._attn_implementation = "eager"
    first.check()
    with pytest.raises(RuntimeError, match="attention is 'eager'"):
        second.check()
    second.on()
    second.check()
    second.off()
    assert config._attn_implementation == before


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


def test_other_attention_chosen_under_a_task_is_not_computed_with_in_silence(families: Any, with_tasks: Any) -> None:
    for name in ("BERT", "Llama"):
        family = families[name]
        config = QTuningConfig(**SMALL, task_type=family.task_type)
        model, inputs = with_tasks(QTuningModel(family.base_model(), config), "first", "second"), family.batch()
        expected = model(**inputs).logits
        model.base_model.set_attn_implementation("eager")
        with pytest.raises(RuntimeError, match="attention is 'eager'"):
            model(**inputs)
        if name == "Llama":
            with pytest.raises(RuntimeError, match="attention is 'eager'"):
                model.generate(**inputs)
        model.set_task("second")
        assert torch.equal(model(**inputs).logits, expected)
