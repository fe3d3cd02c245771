"""`attn_implementation="qtuning_fast"` in whole models."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
)

from qtuning_fast.integrations.transformers import NAME
from qtuning_fast.integrations.transformers.interface import attention_forward

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENCODERS = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES, pad_token_id=1),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    "distilbert": DistilBertConfig(vocab_size=40, dim=32, n_layers=2, n_heads=4, hidden_dim=48),
}
DECODERS = {
    "llama": LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "mistral with a sliding window": MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    ),
}


def ours_and_eager(model: Any) -> tuple[Any, Any]:
    ours, eager = model.eval(), copy.deepcopy(model).eval()
    ours.set_attn_implementation(NAME)
    eager.set_attn_implementation("eager")
    return ours, eager


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_compute_what_eager_does(name: str, batch: dict[str, Tensor]) -> None:
    ours, eager = ours_and_eager(AutoModel.from_config(ENCODERS[name]))
    for inputs in (batch, {"input_ids": batch["input_ids"]}):
        with torch.no_grad():
            torch.testing.assert_close(ours(**inputs).last_hidden_state, eager(**inputs).last_hidden_state)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("padding", [False, True])
def test_decoders_compute_what_eager_does(name: str, padding: bool) -> None:
    ours, eager = ours_and_eager(DECODERS[name])
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding:
        mask[0, :4] = 0
    with torch.no_grad():
        seen = mask.bool()
        torch.testing.assert_close(ours(ids, mask).logits[seen], eager(ids, mask).logits[seen])
        torch.testing.assert_close(ours(ids).logits, eager(ids).logits)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoders_generate_what_eager_does(name: str, cache: str) -> None:
    ours, eager = ours_and_eager(DECODERS[name])
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "pad_token_id": 0, "eos_token_id": None}
    static = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    assert torch.equal(ours.generate(ids, **options, **static), eager.generate(ids, **options))


def test_dropout_is_refused_by_name(tiny_bert: BertModel, batch: dict[str, Tensor]) -> None:
    tiny_bert.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="dropout"):
        tiny_bert.train()(**batch)


def test_gradients_are_those_of_eager(batch: dict[str, Tensor]) -> None:
    ours, eager = (model.double() for model in ours_and_eager(AutoModel.from_config(ENCODERS["bert"])))
    for model in (ours, eager):
        model(**batch).last_hidden_state.square().sum().backward()
    for (name, mine), theirs in zip(ours.named_parameters(), eager.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["deepseek_v4", "doge", "hy_v4"])
def test_models_that_change_masks_on_their_way_are_refused(kind: str) -> None:
    """They append zeros to eager attention's additive masks, or mark tokens in them: ours say neither in that way."""
    module = torch.nn.Identity()
    module.config = SimpleNamespace(model_type=kind)
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match=f"{kind} changes the additive masks"):
        attention_forward(module, x, x, x, None, s_aux=torch.zeros(2))


def test_a_choice_of_blocks_of_keys_is_refused() -> None:
    """MiniMax M3 hands it to attention functions that are not transformers' own; without it all keys would be seen."""
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="block_indices"):
        attention_forward(torch.nn.Identity(), x, x, x, None, block_indices=torch.zeros(1, 1, 3, 1))
