"""Which models can take a prompt in front of their input."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    EsmConfig,
    FalconH1Config,
    LayoutLMConfig,
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
