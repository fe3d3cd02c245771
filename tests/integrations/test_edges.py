"""Families beside those of the table, and what happens when something goes wrong halfway."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM, Inkling2TextConfig, NllbMoeConfig

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1, "reparameterization": None}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = {"vocab_size": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
STACKS = {
    **{f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))},
    **{"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}


def test_sinks_by_another_name_are_refused() -> None:
    config = Inkling2TextConfig(**SIZES, **WORDS, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16)
    with pytest.raises(NotImplementedError, match="attention sinks"):
        QTuningModel(AutoModel.from_config(config), QTuningConfig())


def test_experts_that_read_the_mask_of_eager_attention_are_refused() -> None:
    model = AutoModelForSeq2SeqLM.from_config(NllbMoeConfig(**STACKS, **WORDS, num_experts=4))
    with pytest.raises(NotImplementedError, match="experts"):
        QTuningModel(model, QTuningConfig(task_type="text-to-text"))
